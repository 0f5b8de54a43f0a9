"""What programs at a daemon's socket are made of, whatever drives them: `vchan.client`'s threads,
`vchan.aio`'s event loop, the `vchan://` driver, the gateways.

connection  a session with a daemon that comes back by itself
requests    a program's arguments made a request; an outcome made a result, or an error
endpoints   what is handed in to be served, checked
serving     topics that are served: what comes, which method it means, how it is answered
working     methods run on the loop's own thread, or in a pool's
"""
