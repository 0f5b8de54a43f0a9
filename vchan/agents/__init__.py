"""Agents that the guest's daemon runs: the super-agent with its units, and the standard agent.

unit            a program that the super-agent starts, watches and stops: one file of agents.d.
super-agent     `super_agent`, part of the daemon. `units` reads the files, `supervisor` decides
                when a unit starts and stops, `processes` holds the children, `systemd` runs what is
                left to it, `allowed` says what the control side may do with all of them.
standard agent  `standard`: a process of its own, which serves facts, programs and files.
"""
