"""Print what pip must install before the package can be built and checked: build, runtime and dev requirements."""

import tomllib
from pathlib import Path


def requirements() -> list[str]:
    """Requirements of pyproject.toml, build tools first."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    development = project["project"]["optional-dependencies"]["dev"]
    return [*project["build-system"]["requires"], *project["project"]["dependencies"], *development]


for requirement in requirements():
    print(f"'{requirement}'")
