"""`python -m lit_distill` is the same program as `lit-distill`."""

import sys

from lit_distill.cli import main

if __name__ == "__main__":
    sys.exit(main())
