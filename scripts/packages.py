"""Print requirements of pyproject.toml, one per line: the input of `lock.sh`.

Without an argument: the requirements of build, runtime and development, except packages for which the registry has no
wheel. `packages.py source`: only these packages. `packages.py full`: the packages that only the tests of `make
test-full` use. `packages.py release`: the tools of `scripts/release.py`.
"""

import sys
import tomllib
from pathlib import Path

SOURCE_ONLY = ("argparse-manpage",)


def requirements(kind: str) -> list[str]:
    """Return the requirements of a kind (see above), those of the build first."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    build, extras = project["build-system"]["requires"], project["project"]["optional-dependencies"]
    if kind in ("release", "full"):
        return [*build, *extras[kind]]
    everything = [*build, *project["project"]["dependencies"], *extras["dev"]]
    return [one for one in everything if one.startswith(SOURCE_ONLY) == (kind == "source")]


for requirement in requirements(*sys.argv[1:] or [""]):
    print(requirement)
