"""Run linmu.optimized's Triton kernels in the interpreter on arguments whose last axis comes first in memory,
masks and ids too. Started by test_kernels.py.

    TRITON_INTERPRET=1 python trial_strides.py OPERATOR

What a launching function makes of such a mask elementwise has its strides, and a kernel that takes it for
contiguous reads another token's.
"""

from __future__ import annotations

import sys

from hypothesis import HealthCheck, Phase, given, settings

from ....harness import operator_cases as cases
from ....harness.backends import load
from ....harness.operator_checks import check_strides
from . import mend_scalars
from .trial import shrink_blocks

DRAWN = {
    "selective_scan": cases.scan_cases(["float32"]),
    "bidirectional_scan": cases.bidirectional_cases(["float32"]),
    "scan_step": cases.step_cases(["float32"]),
    "causal_conv": cases.conv_cases(["float32"]),
    "window_attention": cases.window_cases(["float32"]),
    "logit_loss": cases.logit_loss_cases(["float32"]),
}
# what was read wrongly once
KNOWN = {
    "causal_conv": cases.ConvCase(
        2, 2, 3, 1, bias=False, mask="all", initial_state=False, dtype="float32", seed=0
    ),
    "scan_step": cases.StepCase(1, 4, 2, 3, 3, skip=True, valid=False, dtype="float32", seed=0),
}


def main(operator: str) -> None:
    """Raises if strides change a result."""
    shrink_blocks()
    mend_scalars()
    backend = load("linmu.optimized")
    some = settings(
        max_examples=1,  # the interpreter takes a second for a few tokens; a GPU runs all properties
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )

    @some
    @given(case=DRAWN[operator])
    def check(case: cases.Case) -> None:
        check_strides(backend, case)

    check()
    if operator in KNOWN:
        check_strides(backend, KNOWN[operator])


if __name__ == "__main__":
    main(sys.argv[1])
