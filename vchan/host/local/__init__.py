"""Programs on this host, and services that it names: they call, and are called, without the broker.

`programs` is the daemon's socket with the daemon's own methods, and has the programs that serve
topics; `http_services` makes guests' HTTP requests to the services of the configuration.
"""
