"""The wheel holds what the checkout holds, and the reference needs nothing that only a GPU machine has."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = {name: f"linmu/{name}" for name in ("reference", "optimized", "conformance")}
USE_WHEEL = """
import json, sys
sys.path.insert(0, sys.argv[1])
sys.modules["triton"] = None  # from here on `import triton` raises ImportError
import torch
from linmu import optimized, reference
x, dt, A, B = torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1), -torch.ones(1), torch.ones(1, 2, 1, 4)
y, _ = reference.selective_scan(x, dt, A, B, B)
print(json.dumps({"reference": reference.__file__, "optimized": optimized.__file__, "shape": y.shape}))
"""


def package_files(tree: Path, folder: str) -> list[Path]:
    """Every file of one package folder that belongs to it: no bytecode, no results, no tests of our own."""
    left_out = {"__pycache__", "results", "own"}
    files = (path for path in (tree / folder).rglob("*") if path.is_file())
    return sorted(path for path in files if not left_out & set(path.relative_to(tree).parts))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that setuptools reads, so that building leaves nothing behind in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for folder in FOLDERS:
        left_out = shutil.ignore_patterns("__pycache__", ".*")  # .hypothesis stands where pytest was started
        shutil.copytree(ROOT / folder, tree / folder, ignore=left_out)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """A wheel of that tree, built without network."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", str(tree)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_wheel_holds_exactly_the_files_of_the_packages(tree, wheel):
    expected = {
        f"{installed}/{path.relative_to(tree / folder).as_posix()}": path.read_bytes()
        for folder, installed in FOLDERS.items()
        for path in package_files(tree, folder)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        packed = {name: archive.read(name) for name in names}
    assert sorted(packed) == sorted(expected)
    assert [name for name in packed if packed[name] != expected[name]] == []


def test_wheel_adds_one_top_level_name_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"linmu"}


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a fresh interpreter says that has the wheel's files and no triton."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    done = subprocess.run([sys.executable, "-I", "-c", USE_WHEEL, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"folder": str(folder), **json.loads(done.stdout)}


@pytest.mark.parametrize("name", ["reference", "optimized"])
def test_the_unpacked_wheel_imports_on_its_own_and_without_triton(unpacked, name):
    assert Path(unpacked[name]).is_relative_to(unpacked["folder"])


def test_the_reference_computes_without_triton(unpacked):
    assert unpacked["shape"] == [1, 2, 1, 3]


def imported_modules(source: str) -> set[str]:
    """Top-level names that a module imports, anywhere in its body, literal `import_module` calls included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom(level=0):
                names.add(node.module)
            case ast.Call(
                func=ast.Attribute(attr="import_module" | "find_spec")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.add(name)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "source",
    [
        "import triton",
        "def f():\n    from triton import language",
        "import importlib\nimportlib.import_module('triton.language')",
        "x = __import__('triton')",
    ],
)
def test_the_import_reader_finds_triton_however_it_is_written(source):
    assert "triton" in imported_modules(source)


def test_no_file_of_the_reference_imports_triton():
    sources = [path for path in package_files(ROOT, "reference") if path.suffix == ".py"]
    assert sources
    assert [path.name for path in sources if "triton" in imported_modules(path.read_text())] == []


SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:")


def misplaced_sections(source: str) -> list[str]:
    """Lines of docstrings that hold a section's head and something else, or hold it indented."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    lines = [line for text in texts if text for line in text.splitlines()]
    return [line for line in lines if any(head in line.split() and line != head for head in SECTIONS)]


@pytest.mark.parametrize(
    ("docstring", "misplaced"),
    [
        ("What.\n\n    Args:\n        x: it.\n    Returns:\n        y.\n    ", []),
        (
            "What.\n\n    Returns:\n        y, or float64 if\n    `q` is. Raises:\n        Error: no.",
            ["`q` is. Raises:"],
        ),
        ("What.\n\n    Returns: y.", ["Returns: y."]),
        ("What.\n\n    Args:\n        x: it.\n        Returns:\n            y.", ["    Returns:"]),
    ],
)
def test_a_misplaced_section_of_a_docstring_is_found(docstring, misplaced):
    assert misplaced_sections(f'def f():\n    """{docstring}"""') == misplaced


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_section_of_a_docstring_has_its_head_alone_on_a_line(folder):
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (lines := misplaced_sections(path.read_text()))
    }
    assert found == {}


def test_dependencies_are_ranges_and_each_gives_its_reason():
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    for requirement in project["dependencies"]:
        assert ">=" in requirement, f"{requirement}: must name the oldest version that works"
        (line,) = (line for line in text.splitlines() if line.startswith(f'  "{requirement}",'))
        assert "# " in line, f"{requirement}: must say in a comment why it is needed"
