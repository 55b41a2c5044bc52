"""Run linmu.optimized's Triton kernels in the interpreter, watched, on slices more than 2^31 elements apart,
of which the operating system gives memory to those that are touched only. Started by test_kernels.py.

    TRITON_INTERPRET=1 python trial_far.py OPERATOR
"""

from __future__ import annotations

import sys

import torch

from ....harness.compare import assert_same
from ..gpu_cases import arguments, far_apart, results, results_of_views
from . import mend_scalars, watch_memory
from .trial import shrink_blocks


def main(operator: str) -> None:
    """Raises if a far slice is missed, or an address wraps."""
    shrink_blocks()
    mend_scalars()
    length = 5 if operator == "logit_loss" else 30  # a token is a program of its own
    given = arguments(operator, "float16", heads=2, groups=1, head_dim=4, length=length, device="cpu")
    with watch_memory():
        found = results_of_views(operator, far_apart(operator, given, fill=False))
    assert_same(found, results(operator, given), operator)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
