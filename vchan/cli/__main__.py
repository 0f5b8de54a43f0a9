"""python -m vchan.cli"""

from __future__ import annotations

from vchan.cli import main

if __name__ == "__main__":
    main()
