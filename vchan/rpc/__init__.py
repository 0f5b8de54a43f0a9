"""Requests and replies: what a session carries, and what both ends of a hop keep of it. Pure.

messages    their kinds and layouts
in_flight   the two ends of every hop: a requester holds a request until it is over, a responder
            remembers what it has run
dispatcher  requests for servers of topics: which server gets which, and what waits
outcomes    how a request ends without an answer, and whether it has run
bodies      the JSON inside requests and replies; `httpcall` is that of an HTTP request
arguments   what programs hand to Client and Agent, checked
reports     what a guest tells its host: names of both ends
deferred    an answer that a daemon's own method gives later
"""
