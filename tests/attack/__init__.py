"""Attacks on a host's daemon, each by name.

hostile.py      the guest that attacks: one file, which also runs inside of a VM
run.py          one attack beside a well-behaved VM: what happened, and what it cost
neighbour.py    the well-behaved VM
"""
