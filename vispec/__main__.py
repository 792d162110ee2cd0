"""`python -m vispec`: the command line."""

import sys

from vispec.cli import main

if __name__ == "__main__":
    sys.exit(main())
