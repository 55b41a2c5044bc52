"""Lets an installed suite be run by its name: `pytest --pyargs linmu.conformance.properties --backend mine`.

pytest reads the options of a conftest.py before it runs only for folders named on the command line, not for
names of packages. This plugin, which the installed package registers, puts the folder in the name's place.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

NAME = "linmu.conformance"


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Replace names that begin with linmu.conformance by paths; all other arguments stay as they are."""
    backends = {value for option, value in pairwise(args) if option == "--backend"}  # not known to pytest yet
    known = early_config.known_args_namespace
    known.file_or_dir = [name if name in backends else path_of(name) for name in known.file_or_dir]
    args[:] = [name if name in backends else path_of(name) for name in args]


def path_of(argument: str) -> str:
    """`linmu.conformance.properties.test_scan::test_x` -> `.../properties/test_scan.py::test_x`."""
    name, colons, test = argument.partition("::")
    if name != NAME and not name.startswith(f"{NAME}."):
        return argument
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return argument
    origin = Path(spec.origin)
    return f"{origin.parent if origin.name == '__init__.py' else origin}{colons}{test}"
