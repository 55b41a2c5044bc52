"""Right backends of other kinds pass: the properties ask for results, not for the reference's way to them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = f"{__package__}.honest"
# backend -> files of properties that concern it, options
BACKENDS = {
    "chunked": (("scan", "bidirectional_scan", "scan_step"), ()),
    "doubling": (("scan", "bidirectional_scan", "scan_step"), ()),
    "flash": (("window_attention", "local_swin"), ()),
    "jax_backend": (
        ("scan", "bidirectional_scan", "scan_step", "window_attention", "causal_conv"),
        ("--few-shapes",),
    ),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_an_honest_backend_passes(name, request):
    """In every dtype, by the command that a third party gives; --thorough if this run is."""
    if name == "jax_backend" and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is an extra of its own: pip install linmu[jax]")
    properties, options = BACKENDS[name]
    files = [f"conformance/properties/test_{part}.py" for part in properties]
    thorough = ["--thorough"] if request.config.getoption("thorough") else []
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files),
            *("--backend", f"{PACKAGE}.{name}", *options, *thorough),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20, done.stdout
