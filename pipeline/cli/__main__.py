"""`python -m pipeline.cli` is the same as `headrace`."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
