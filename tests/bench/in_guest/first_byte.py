"""What an interpreter's start costs: writes one byte to the port and ends.

python3 first_byte.py PORT
"""

import os
import sys

os.write(os.open(sys.argv[1], os.O_RDWR), b".")
