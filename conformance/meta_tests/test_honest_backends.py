"""Right backends of other kinds pass: the properties ask for results, not for the reference's way to them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Lock

import pytest

from linmu import reference

from ..harness.backends import Backend, load
from ..harness.large_cases import LARGE
from ..harness.operator_checks import check_interruptions
from ..properties import test_bidirectional_scan, test_scan
from .planting import run_quietly

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = f"{__package__}.honest"
SCANS = ("scan", "bidirectional_scan", "scan_step")
# backends, the files of properties that concern them, options
RUNS = {
    "torch": (
        ("chunked", "doubling", "flash"),
        (*SCANS, "window_attention", "local_swin"),
        # doubling holds a state for every token: at the sizes of people it takes most of the time
        (
            "-k",
            "(reference or sizes or finite) and not (long_packed or values or 272 or rows)"
            " and not (doubling and (sizes or long_prompts or almost))",
        ),
    ),
    "jax": (("jax_backend",), (*SCANS, "window_attention", "causal_conv"), ("--few-shapes",)),
}


@pytest.mark.parametrize("run", RUNS)
def test_honest_backends_pass(run, request):
    """In every dtype, by the command that a third party gives; with --thorough every property, many times."""
    if run == "jax" and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is an extra of its own: pip install linmu[jax]")
    names, properties, options = RUNS[run]
    thorough = request.config.getoption("thorough")
    if thorough:
        names += ("differences",) if run == "torch" else ()
        options = ("--thorough", *(option for option in options if option == "--few-shapes"))
    files = [f"conformance/properties/test_{part}.py" for part in properties]
    backends = [part for name in names for part in ("--backend", f"{PACKAGE}.{name}")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *backends, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 25 * len(names), done.stdout


@pytest.mark.parametrize(
    "test",
    (
        test_scan.test_large_and_tiny_steps_are_finite,
        test_scan.test_strong_decay_is_finite_and_forgets_everything,
        test_scan.test_long_scans_match_the_reference,
        test_bidirectional_scan.test_extreme_gates_and_decays_are_finite,
    ),
    ids=lambda test: test.__name__,
)
def test_differences_of_sums_pass(test):
    """Where sums of logarithms are largest; with --thorough every property, as above."""
    run_quietly(test, load(f"{PACKAGE}.differences"))


def test_a_call_may_hold_a_lock():
    """Of a call that another thread makes meanwhile nothing more is asked than that it ends at last."""
    lock = Lock()

    def locked(*args, **given):
        with lock:
            return reference.causal_conv(*args, **given)

    backend = Backend("the reference behind a lock", reference, causal_conv=locked)
    check_interruptions(backend, LARGE["causal_conv"]["300 rows"])
