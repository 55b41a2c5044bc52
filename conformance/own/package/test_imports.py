"""What an import costs and promises: operators without transformers, students known to its Auto classes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from linmu import optimized, reference

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {"reference": reference, "optimized": optimized}

STUDENT = """
import pickle
from transformers import AutoConfig, AutoModelForCausalLM
settings = {"version": 1, "layers": [0], "options": {}}
sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, vocab_size=8)
config = AutoConfig.for_model("linmu_qwen2", linmu=settings, num_hidden_layers=1, **sizes)
model = AutoModelForCausalLM.from_config(config)
assert type(model).__name__ == "LinMUQwen2ForCausalLM"
for kind in (type(model), type(config)):
    assert pickle.loads(pickle.dumps(kind)) is kind
"""

# Runs each argument in a process of its own, forked from one that has the slow parts of transformers in
# memory, but not yet `transformers` itself; prints those that fail.
FORK_EACH = """
import gc, os, sys, traceback
import transformers.models.auto.modeling_auto, transformers.models.auto.processing_auto
import transformers.generation
import transformers.models.qwen2.modeling_qwen2, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
del sys.modules["transformers"]
gc.freeze()  # each fork's collector would look at, and so copy, all that was imported
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            assert not [name for name in sys.modules if name.startswith("linmu")]
            exec(code, {})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print(code)
"""


def said(code: str, *arguments: str, path: Path | None = None) -> str:
    """What a fresh interpreter prints that runs `code`; a RuntimeWarning is an error there."""
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_an_operator_is_imported_with_torch_and_nothing_else(package):
    code = f"""
import json, sys, torch
before = set(sys.modules)
from linmu.{package} import selective_scan
print(json.dumps(sorted({{name.split(".")[0] for name in set(sys.modules) - before}})))
"""
    added = set(json.loads(said(code)))
    assert "linmu" in added
    assert added - set(sys.stdlib_module_names) == {"linmu"}


def test_the_auto_classes_know_students_after_an_import():
    assert said(f"import linmu.optimized\n{STUDENT}") == ""


def test_the_auto_classes_know_students_in_whatever_order_things_are_imported():
    orders = [
        "import linmu.{0}",
        "import linmu.{0}, transformers",
        "import transformers, linmu.{0}",
        "from transformers import AutoModelForCausalLM; import linmu.{0}",
        "from linmu import {0}; {0}.convert; import transformers",
        "from linmu.{0} import *",
    ]
    codes = [f"{order.format(package)}\n{STUDENT}" for order in orders for package in PACKAGES]
    assert said(FORK_EACH, *codes) == ""


def test_the_auto_classes_know_students_whichever_module_is_imported_first():
    """What registers the students must not need a module that is itself half imported."""
    names = [
        f"linmu.reference.{folder}.{path.stem}".removesuffix(".__init__")
        for folder in ("student", "prompts")  # training's modules import theirs
        for path in sorted((ROOT / "reference" / folder).glob("*.py"))
    ]
    assert len(names) > 10
    known = "from transformers import AutoConfig; AutoConfig.for_model('linmu_qwen2')"
    assert said(FORK_EACH, *(f"import {name}\n{known}" for name in names)) == ""


def test_a_module_that_an_import_could_have_loaded_runs_as_a_command_without_a_warning():
    module = "linmu.reference.student.convert"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m {module}")


def test_a_transformers_that_cannot_hold_students_is_imported_with_a_warning(tmp_path):
    (tmp_path / "transformers.py").write_text("version = 'another'\n")
    code = """
import warnings
import linmu.reference
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers
print(transformers.version, *[warning.message for warning in caught])
"""
    printed = said(code, path=tmp_path)
    assert printed.startswith("another linmu: the Auto classes do not open students' folders: ")


def test_asking_whether_transformers_is_there_does_not_import_it():
    code = """
import importlib.util, sys
import linmu.reference
print(importlib.util.find_spec("transformers").name, "transformers" in sys.modules)
"""
    assert said(code) == "transformers False\n"


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_every_public_name_is_there_and_listed(package):
    assert set(package.__all__) <= set(dir(package))
    assert all(hasattr(package, name) for name in package.__all__)
    assert not hasattr(package, "converted")


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_every_name_that_is_imported_late(package):
    """They do not run `__getattr__`: an `if TYPE_CHECKING:` block has the same names of the same modules."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE" in ast.unparse(node.test))
    shown = {alias.name: "." * node.level + node.module for node in block.body for alias in node.names}
    assert shown == PACKAGES[package].WITH_TRANSFORMERS


def test_every_name_that_is_imported_from_linmu_is_there():
    """In files that need an extra and are not imported without it, too."""
    files = [
        path
        for package in ("reference", "optimized", "conformance")
        for path in (ROOT / package).rglob("*.py")
    ]
    imported = {name for path in files for name in imported_names(path)}
    assert len(imported) > 500
    assert sorted(f"{of} in {module}" for module, of in imported if not is_there(module, of)) == []


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a file takes from linmu by `from`."""
    package = ("linmu", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, node.module) if node.module else above)
            if module.startswith("linmu"):
                yield from ((module, alias.name) for alias in node.names if alias.name != "*")


def is_there(module: str, name: str) -> bool:
    """Whether a module has a name, or a package a module; yes where it needs an extra that is not here."""
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        return not error.name.startswith("linmu")
    return hasattr(found, name) or (hasattr(found, "__path__") and find_spec(f"{module}.{name}") is not None)
