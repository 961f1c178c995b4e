"""Print the build, runtime and development requirements of pyproject.toml, one per line: the input of `lock.sh`.

`packages.py source` prints only the packages of which the registry has no wheel; without `source`, these are left out.
"""

import sys
import tomllib
from pathlib import Path

SOURCE_ONLY = ("argparse-manpage",)


def requirements(source: bool) -> list[str]:
    """Return the requirements, those of the build first. `source`: select the packages of `SOURCE_ONLY`, instead of all
    others."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    development = project["project"]["optional-dependencies"]["dev"]
    everything = [*project["build-system"]["requires"], *project["project"]["dependencies"], *development]
    return [one for one in everything if one.startswith(SOURCE_ONLY) == source]


for requirement in requirements("source" in sys.argv[1:]):
    print(requirement)
