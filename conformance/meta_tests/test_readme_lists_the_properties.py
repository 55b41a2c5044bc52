"""`conformance/README.md` lists every property, and no property that does not exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

PROPERTIES = Path(__file__).parents[1] / "properties"
README = PROPERTIES.parent / "README.md"


def names_of_tests() -> set[str]:
    """The tests of all files of properties."""
    package = __package__.rpartition(".")[0]
    files = sorted(PROPERTIES.glob("test_*.py"))
    modules = [importlib.import_module(f"{package}.properties.{file.stem}") for file in files]
    return {name for module in modules for name in vars(module) if name.startswith("test_")}


def test_every_property_is_listed_and_every_listed_one_exists():
    """One line a property, with what it guards against."""
    listed = set(re.findall(r"`(test_\w+)`", README.read_text()))
    assert listed == names_of_tests()


def test_the_property_that_is_worked_through_is_a_real_one():
    """The README's example is quoted, not written for it; its imports are those of another folder."""
    examples = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    (example,) = (each for each in examples if "property_of" in each)
    source = (PROPERTIES / "test_scan.py").read_text()
    imports = re.compile(r"^(?:from|import) .*\n", re.MULTILINE)
    parts = imports.sub("", example).strip().split("\n\n\n")
    assert len(parts) == 2
    assert [part for part in parts if part not in source] == []
