"""``python -m lenslrp.cli``."""

import sys

from lenslrp.cli.main import main

sys.exit(main())
