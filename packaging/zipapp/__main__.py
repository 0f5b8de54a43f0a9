"""vchan-guest in one file: python3 vchan-guest.pyz [OPTIONS]. The library is in it too:
PYTHONPATH=vchan-guest.pyz python3 agent.py."""

import sys

# In the grammar of old Pythons: they are to read the refusal.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("vchan-guest: needs Python 3.11, this is %d.%d\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)

from vchan.guest.daemon import main

main()
