"""Run the command `pageferry` as `python -m pageferry`."""

import sys

if not sys.flags.safe_path:  # sys.path[0] is the current directory, which another user may control
    del sys.path[0]

from pageferry.cli.main import main

sys.exit(main())
