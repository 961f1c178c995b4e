"""`python -m pageferry` is the command `pageferry`."""

import sys

from pageferry.cli.main import main

sys.exit(main())
