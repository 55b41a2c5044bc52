"""A lesson on the Triton kernels, run by Triton's interpreter, teaches what the reference's teaches."""

from __future__ import annotations

import pytest

from ..forks import INTERPRETER, TRIALS, run_forked


@pytest.mark.parametrize("what", ["KERNELS", "PACKED"])
def test_a_lesson_on_kernels_equals_the_references(what, request):
    """Norms, gates, errors, adapters, the teacher's attention: values and gradients. Packed rows have padding
    too; with --thorough padding by itself, and images and videos."""
    more = ("PADDED", "VISION") if request.config.getoption("thorough") and what == "PACKED" else ()
    for each in (what, *more):
        done = run_forked(INTERPRETER, f"{TRIALS}.trial_lesson", each)
        assert done.returncode == 0, done.stdout + done.stderr
