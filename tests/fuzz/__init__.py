"""Coverage-guided fuzzing of everything that reads what a guest sends.

targets.py      a function for each parser: takes any bytes, raises if a promise is broken
session.py      ... and for the session: the bytes are what a hostile peer does
downward.py     ... and for the host's requests: what a hostile guest and its broker do
script.py       reads choices off a fuzzer's bytes
corpus/         inputs that reach something, a line each; what once broke has a name
seeds.py        what the corpora begin with: the test vectors, and examples
worker.py       one target under atheris, in a process of its own
__main__.py     scripts/fuzz
"""
