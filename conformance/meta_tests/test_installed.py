"""The suite runs from the wheel, in an empty folder, by its name: properties and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = """
from importlib.util import find_spec
from linmu.reference import bidirectional_scan, scan_order, selective_scan

def inverse_order(order):
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


def test_one_installed_property_runs_by_name(site, tmp_path):
    """With the options of the suite, on the backend of the user, from the files of the wheel."""
    test = "linmu.conformance.properties.test_layout::test_order_then_inverse_is_identity"
    done = run(site, tmp_path, "--pyargs", test, "--backend", "their_kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linmu backend: their_kernels" in done.stdout and "1 passed" in done.stdout
    assert "not implemented, so not tested" in done.stdout


def test_properties_take_a_backend_and_are_nothing_else(site, tmp_path):
    """No meta test, no test of this repository alone: every test collected runs on the backend named."""
    options = ["--pyargs", "linmu.conformance.properties", "--backend", "their_kernels"]
    done = run(site, tmp_path, *options, "--collect-only", "-q")
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) >= 4, done.stdout + done.stderr
    assert [line for line in tests if "[their_kernels" not in line] == []
    assert {line.split("::")[0] for line in tests} == {"test_layout.py", "test_errors.py"}
