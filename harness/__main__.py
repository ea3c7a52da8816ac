"""`python3 -m harness`: the same as the command moe-harness, with nothing installed."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
