"""`python -m pageferry` is the command `pageferry`."""

import sys

if not sys.flags.safe_path:  # the current directory, which may belong to another user
    del sys.path[0]

from pageferry.cli.main import main

sys.exit(main())
