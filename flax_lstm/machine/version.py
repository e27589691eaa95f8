# SPDX-License-Identifier: Apache-2.0
"""Which version of a package this is."""

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str = "flax-lstm") -> str:
    """The version that is installed; a checkout on the path that was not installed has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
