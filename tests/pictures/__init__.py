"""The documents' pictures, in docs/pictures: each made of data that stands beside it.

    python -m tests.pictures            names those that are not what their data make; 1 if any
    python -m tests.pictures --write    makes them
    python -m tests.pictures --record   runs scripts/demo, records it, and makes them

demo.svg is made of demo.cast, which `asciinema play` plays, too; the bars of what
`scripts/bench --json > docs/pictures/bench.json` measured. The same data make the same bytes.
"""
