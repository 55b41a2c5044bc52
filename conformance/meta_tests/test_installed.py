"""The suite runs from the wheel, in an empty folder, by its name: properties and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from .. import pytest_plugin

ROOT = Path(__file__).resolve().parents[2]
BACKEND = """
from importlib.util import find_spec
import torch
from linmu.reference import bidirectional_scan, scan_order, selective_scan

def inverse_order(order):
    if order.ndim != 2 or order.dtype != torch.int64:
        got = f"{{tuple(order.shape)}} {{order.dtype}}"
        raise ValueError(f"inverse_order: order must be (B, L) int64, got {{got}}")
    return order.argsort(1)

assert find_spec("linmu.conformance").origin.startswith({site!r}), find_spec("linmu.conformance").origin
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the files of the wheel and of its metadata, as pip leaves them."""
    tree, site = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for folder in ("reference", "optimized", "conformance"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", str(tree)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """pytest in an empty folder that holds a backend and nothing else, on the files of the wheel."""
    (folder / "their_kernels.py").write_text(BACKEND.format(site=str(site)))
    path = os.pathsep.join((str(site), str(folder)))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


def test_the_installed_properties_run_by_name(site, tmp_path):
    """With the options of the suite, on the user's backend, from the files of the wheel, and no other."""
    options = ["--pyargs", "linmu.conformance.properties", "--backend", "their_kernels"]
    done = run(site, tmp_path, "-v", *options, "-k", "inverse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linmu backend: their_kernels" in done.stdout
    assert "not implemented, so not tested" in done.stdout
    tests, files = (
        [line for line in done.stdout.splitlines() if "::" in line],
        ("test_layout.py", "test_errors.py"),
    )
    assert len(tests) >= 4, done.stdout
    assert [line for line in tests if "[their_kernels" not in line] == []
    assert {line.split("::")[0] for line in tests} == {f"conformance/properties/{name}" for name in files}


def test_names_of_modules_and_tests_become_paths():
    """All other arguments stay as they are."""
    test = pytest_plugin.path_of("linmu.conformance.properties.test_layout::test_x[mine]")
    assert test.endswith("/properties/test_layout.py::test_x[mine]")
    assert Path(pytest_plugin.path_of("linmu.conformance.properties")).is_dir()
    for other in ("conformance/properties", "linmu.reference", "linmu.conformance.not_there", "-q", "mine"):
        assert pytest_plugin.path_of(other) == other


def test_a_backend_below_linmu_conformance_stays_a_module():
    name = "linmu.conformance.meta_tests.honest.chunked"
    args = ["--backend", name, "linmu.conformance.properties", "-q"]
    config = SimpleNamespace(known_args_namespace=SimpleNamespace(file_or_dir=[name, args[2]]))
    pytest_plugin.pytest_load_initial_conftests(config, args)
    assert args[:2] == ["--backend", name] and Path(args[2]).is_dir()
    assert config.known_args_namespace.file_or_dir == [name, args[2]]
