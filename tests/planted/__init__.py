"""Planted bugs: what the tests must catch. See bugs.py."""
