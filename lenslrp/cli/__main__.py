"""``python -m lenslrp.cli``."""

import sys

from lenslrp.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
