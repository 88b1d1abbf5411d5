"""``python -m lenslrp.cli``."""

import sys

from lenslrp.cli.commands import main

sys.exit(main())
