"""`linmu.optimized` has the names of `linmu.reference`, with the same signatures and constructors."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from linmu import optimized, reference

OWN_NAMES = {"get_engine", "set_engine"}  # what only a backend with engines has
CLASSES = [name for name in reference.__all__ if inspect.isclass(getattr(reference, name))]
FUNCTIONS = [name for name in reference.__all__ if name not in CLASSES]


def methods(kind: type) -> dict[str, Any]:
    """The public methods and properties of a class, inherited ones of ours included, by name."""
    own = [base for base in inspect.getmro(kind) if base.__module__.startswith("linmu.")]
    names = {name for base in own for name in vars(base) if not name.startswith("_")}
    found = {name: inspect.getattr_static(kind, name) for name in names}
    plain = {name: getattr(value, "__func__", getattr(value, "fget", value)) for name, value in found.items()}
    return {name: value for name, value in plain.items() if inspect.isfunction(value)}


def differences(reference_class: type, optimized_class: type) -> dict[str, tuple[str, str]]:
    """Methods of the reference that the other class has with another signature, or lacks."""
    ours = {name: str(inspect.signature(value)) for name, value in methods(optimized_class).items()}
    theirs = {name: str(inspect.signature(value)) for name, value in methods(reference_class).items()}
    return {name: (theirs[name], ours.get(name)) for name in theirs if theirs[name] != ours.get(name)}


def test_every_name_of_the_reference_is_exported():
    assert set(optimized.__all__) - OWN_NAMES == set(reference.__all__)


def test_there_are_classes_and_functions_to_compare():
    assert {"FlexMA", "LocalSwin", "MMATE", "Lesson", "VisionLayout"} <= set(CLASSES)
    assert {"selective_scan", "causal_conv", "logit_loss", "convert", "load"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_same_signature(name):
    ours, theirs = getattr(optimized, name), getattr(reference, name)
    assert str(inspect.signature(ours)) == str(inspect.signature(theirs))


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_the_references_with_the_same_constructor_and_methods(name):
    ours, theirs = getattr(optimized, name), getattr(reference, name)
    assert issubclass(ours, theirs)
    assert str(inspect.signature(ours)) == str(inspect.signature(theirs))
    assert differences(theirs, ours) == {}


@pytest.mark.parametrize("name", ["FlexMA", "LocalSwin", "MMATE"])
def test_modules_inherit_their_constructor(name):
    assert getattr(optimized, name) is not getattr(reference, name)
    assert "__init__" not in vars(getattr(optimized, name))


@pytest.mark.parametrize("change", ["self, y, x", "self, x, y=2", "self, x, *, y", "self, x, y: int"])
def test_a_changed_signature_is_noticed(change):
    class Before:
        def method(self, x, y): ...

    Before.__module__ = "linmu.reference.before"
    names: dict[str, Any] = {}
    exec(f"def method({change}): ...", names)
    after = type("After", (Before,), {"method": names["method"], "__module__": "linmu.optimized.after"})
    assert set(differences(Before, after)) == {"method"}


def test_importing_is_silent_and_loads_no_kernel():
    code = (
        "import sys, linmu.optimized; "
        "print([name for name in sys.modules if name.startswith('linmu') and 'kernels' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert "linmu" not in done.stderr
