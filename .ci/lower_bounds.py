"""Print constraints for pip that pin every dependency of pyproject.toml to its lower bound.

Usage: `python .ci/lower_bounds.py > oldest.txt && pip install -e ".[dev]" -c oldest.txt`
"""

import re
import tomllib
from pathlib import Path

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?\s*(>=|==)\s*(?P<version>[^,;\s]+)"
)


def find_lower_bounds(pyproject: str) -> list[str]:
    """Return `name==version` for each requirement; one without a lower bound is an error."""
    project = tomllib.loads(pyproject)["project"]
    requirements = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        requirements += extra
    bounds = []
    for requirement in requirements:
        if requirement.startswith(f"{project['name']}["):  # extras of the package itself
            continue
        match = _REQUIREMENT.match(requirement)
        if match is None:
            raise ValueError(f"pyproject.toml gives {requirement!r} no lower bound")
        bounds.append(f"{match['name']}=={match['version']}")
    return bounds


if __name__ == "__main__":
    print(*find_lower_bounds(Path("pyproject.toml").read_text(encoding="utf-8")), sep="\n")
