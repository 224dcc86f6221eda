"""`python -m pl_attnedit.cli` is `pl-attnedit`."""

import sys

from pl_attnedit.cli import main

sys.exit(main())
