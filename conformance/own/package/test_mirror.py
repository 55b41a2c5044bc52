"""`optimized/` mirrors `reference/`: same files, names, signatures and constructors, compared as text."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OWN_NAMES = {"get_engine", "set_engine"}  # what only a backend with engines has


def parsed(package: str, name: str) -> ast.Module:
    return ast.parse((ROOT / package / f"{name}.py").read_text())


def exported(package: str) -> set[str]:
    """The names in `__all__`."""
    for node in parsed(package, "__init__").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package}/__init__.py: must have __all__")


def twins() -> list[str]:
    """The modules that the reference exports names from, and those of its computations they are built on."""
    imports = (node for node in parsed("reference", "__init__").body if isinstance(node, ast.ImportFrom))
    return sorted({node.module for node in imports} | {"checks", "precision", "projections"})


def public(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def signatures(module: ast.Module) -> dict[str, str]:
    """Public functions, and methods of public classes, by dotted name: arguments, defaults, annotations."""
    found = {}
    for node in filter(public, module.body):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
        else:
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
            found |= {f"{node.name}.{method.name}": signature(method) for method in methods}
    return found


def signature(function: ast.FunctionDef) -> str:
    returns = ast.unparse(function.returns) if function.returns else "nothing"
    return f"({ast.unparse(function.args)}) -> {returns}"


def differences(reference: ast.Module, optimized: ast.Module) -> dict[str, tuple[str, str]]:
    """Names that both modules define, with different signatures."""
    ours, theirs = signatures(optimized), signatures(reference)
    return {
        name: (theirs[name], ours[name]) for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]
    }


def test_every_name_of_the_reference_is_exported():
    assert exported("optimized") - OWN_NAMES == exported("reference")


@pytest.mark.parametrize("name", twins())
def test_every_file_has_a_twin(name):
    assert (ROOT / "optimized" / f"{name}.py").is_file()


@pytest.mark.parametrize("name", twins())
def test_twins_have_the_same_signatures(name):
    assert differences(parsed("reference", name), parsed("optimized", name)) == {}


@pytest.mark.parametrize("change", ["y, x", "x, y=2", "x, *, y", "x, y: int"])
def test_a_changed_signature_is_noticed(change):
    before, after = ast.parse("def f(x, y): ..."), ast.parse(f"def f({change}): ...")
    assert set(differences(before, after)) == {"f"}


@pytest.mark.parametrize("name", ["flex_ma", "local_swin", "m_mate"])
def test_modules_inherit_their_constructor(name):
    classes = [node for node in parsed("optimized", name).body if isinstance(node, ast.ClassDef)]
    assert classes
    for node in classes:
        assert [ast.unparse(base) for base in node.bases] == [f"reference.{node.name}"]
        assert "__init__" not in {part.name for part in node.body if isinstance(part, ast.FunctionDef)}


def test_importing_is_silent_and_loads_no_kernel():
    code = (
        "import sys, linmu.optimized; "
        "print([name for name in sys.modules if name.startswith('linmu') and name.endswith('_kernels')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert "linmu" not in done.stderr
