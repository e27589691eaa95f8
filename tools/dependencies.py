# SPDX-License-Identifier: Apache-2.0
"""What an installation of this package brings with it, each with its version and licence.

    python tools/dependencies.py                    lines of a constraints file
    python tools/dependencies.py --check            status 1 for a licence that is not permissive

Reads what is installed here, from the package and its extra `dev` on down.
"""

import argparse
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
# Words of licences under which anybody may use, change and give on, keeping notices. Those of
# Mozilla bind changes of their own files alone, and none of these is copied here.
ALLOWED = ("apache", "bsd", "mit", "isc", "psf", "python software", "zlib", "mpl", "mozilla")


def closure(lines: list[str]) -> dict[str, Distribution]:
    """The packages that are required, and these require, by name; what is not installed is for
    another platform or version of Python."""
    found: dict[str, Distribution] = {}
    asked: set[tuple[str, str]] = set()
    todo = [(line, "") for line in lines]
    while todo:
        line, extra = todo.pop()
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(needed.name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = package
        for wanted in {"", *needed.extras} - {extra for seen, extra in asked if seen == name}:
            asked.add((name, wanted))
            todo += [(line, wanted) for line in package.requires or ()]
    return found


def licences(package: Distribution) -> list[str]:
    """In its own words, which are in one place or another; the shortest first."""
    about = package.metadata
    known = [about.get("License-Expression") or "", (about.get("License") or "").split("\n")[0]]
    named = [line for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    known += [", ".join(line.split(" :: ")[-1] for line in named)]
    return sorted(filter(None, known), key=len) or ["not said"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    strange = 0
    for name, package in sorted(closure(wanted).items()):
        said = licences(package)
        known = [one for one in said if any(word in one.lower() for word in ALLOWED)]
        strange += not known
        if not check:
            print(f"{name}=={package.version}  # {(known or said)[0]}")
        elif not known:
            print(f"{name} {package.version}: licence {said[0]!r} is not known as permissive")
    return int(check and strange > 0)


if __name__ == "__main__":
    sys.exit(main())
