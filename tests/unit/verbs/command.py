"""Command `pageferry` with the verbs of this folder, for tests that need a separate process."""

import sys

from pageferry.cli.main import main
from pageferry.cli.verbs import VERBS, Verb

VERBS["lister"] = Verb("tests.unit.verbs.lister", "List [some] steps.")
VERBS["sleeper"] = Verb("tests.unit.verbs.sleeper", "Sleep.")

if __name__ == "__main__":
    sys.exit(main())
