"""vchan-conductor: guests' requests, judged once more on the control side.

admission   pure: what a host hands in, who may have what, and how much
forward     oslo.messaging: the request goes on to its target, and what comes back
config      its options
daemon      the service that hosts ask, the process
"""
