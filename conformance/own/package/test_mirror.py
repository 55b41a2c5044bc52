"""`optimized/` mirrors `reference/`: the same public names, with the same signatures."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from linmu import optimized, reference

OWN_NAMES = {"accelerate", "get_engine", "set_engine", "unaccelerate"}  # of kernels and their launches
NAMES = sorted(reference.__all__)
MODULES = ("FlexMA", "LocalSwin", "MMATE")


def signatures(thing: object) -> dict[str, str]:
    """Signatures by name: of a function; of a class's constructor and public methods and its properties."""
    if not inspect.isclass(thing):
        return {"": str(inspect.signature(thing))}
    found = {"__init__": str(inspect.signature(thing.__init__))}
    for name, member in inspect.getmembers(thing):
        if not name.startswith("_") and inspect.isroutine(member):
            found[name] = str(inspect.signature(member))
        elif isinstance(member, property):
            found[name] = "property"
    return found


def differences(reference_thing: object, optimized_thing: object) -> dict[str, tuple[str, str | None]]:
    """What the reference has and the other has not, or with another signature."""
    wanted, found = signatures(reference_thing), signatures(optimized_thing)
    return {name: (each, found.get(name)) for name, each in wanted.items() if found.get(name) != each}


def test_every_name_of_the_reference_is_exported():
    assert set(optimized.__all__) - OWN_NAMES == set(reference.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_names_have_the_same_signatures(name):
    assert differences(getattr(reference, name), getattr(optimized, name)) == {}


@pytest.mark.parametrize("change", ["y, x", "x, y=2", "x, *, y", "x, y: int"])
def test_a_changed_signature_is_noticed(change):
    spaces = {}, {}
    for space, arguments in zip(spaces, ("x, y", change), strict=True):
        exec(f"class C:\n    def f(self, {arguments}): ...\ndef g({arguments}): ...", space)
    assert set(differences(spaces[0]["C"], spaces[1]["C"])) == {"f"}
    assert set(differences(spaces[0]["g"], spaces[1]["g"])) == {""}


@pytest.mark.parametrize("name", MODULES)
def test_modules_inherit_their_constructor(name):
    ours, theirs = getattr(optimized, name), getattr(reference, name)
    assert ours.__bases__ == (theirs,)
    assert ours.__init__ is theirs.__init__


def test_importing_is_silent_and_loads_no_kernel():
    code = (
        "import sys, linmu.optimized; "
        "print([name for name in sys.modules if "
        "name.startswith('linmu.optimized') and '.kernels' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert "linmu" not in done.stderr
