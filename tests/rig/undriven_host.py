"""vchan-host as it is, on libvirt's test driver: domains without a hypervisor.

The channels of such domains are whatever listens on the paths in their XML: a test.

    python -m tests.rig.undriven_host --config-file FILE
"""

from __future__ import annotations

import libvirt

from vchan.host.daemon import main

# The driver is in this process: it has no connection to keep alive, and says so.
libvirt.virConnect.setKeepAlive = lambda *_: 0

if __name__ == "__main__":
    main()
