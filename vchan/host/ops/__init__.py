"""For the operator: programs beside the daemon, which ask it as the command `vchan` does.

doctor       what is wrong with a host, and what to do about it
metrics      the daemon's counters for Prometheus
page         vchan-page: a status page; `status_page` is that page as HTML
masakari     vchan-masakari: tells masakari of dead guests; `deaths` judges which are
asking       what a daemon says of itself and of each VM, for these two
"""
