"""A real cloud on one machine: nova, placement, keystone, glance, two compute services, and vchan.

    scripts/cloud [--short] [--json]

Rules of this package
1. Everything of OpenStack is as it is published; neutron alone is a stub, and servers have no
   network. vchan is configured as its documents say.
2. All processes are in namespaces of their own (processes, network, mounts), which end with the
   program: nothing is left running, and nothing here meets what else is on the machine.
3. What ran in a guest is judged by what the guest says on its console, which outlives it, and not
   by what vchan says.
4. `verdict` and `settings` are pure.

`install` makes the environment and keeps it; `control` and `compute` start the parts, `stage` all
of them; `openstack` speaks to them; `load`, `journal` and `verdict` count; `operations` has what is
done to servers; `run` does it all.
"""
