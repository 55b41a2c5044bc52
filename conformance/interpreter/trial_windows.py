"""Run both kernels of window attention's forward pass in the interpreter, one without the other. Started by
test_kernels.py.

    TRITON_INTERPRET=1 python trial_windows.py
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from torch import Tensor
from trial import shrink_blocks, window_cases

from linmu.optimized import batched_windows, window_kernels, window_plan
from linmu.optimized.window_tiles import LOG2_E

sys.path.insert(0, __file__.rpartition("/")[0] + "/..")
from compare import assert_exact, assert_same

from interpreter import mend_bfloat16, mend_scalars, watch_memory


def written(left_out: str, *arguments) -> tuple[Tensor, Tensor]:
    """o and lse without one of the two launches: NaN where nobody writes."""
    with mock.patch.object(window_kernels, left_out, lambda *_, **__: None), watch_memory():
        return window_kernels.forward(*arguments)


def main() -> None:
    """Raises unless each token's o and lse are written once, and lse is that of the torch engine."""
    for number, given in enumerate(window_cases()):
        case, ids = f"case {number} of window_attention", given["window_id"]
        q, k, v = (given[name].bfloat16() for name in "qkv")
        arguments = (q, k, v, *window_plan.window_plan(ids), 0.3)
        one, other = written("launch_rest", *arguments), written("launch_held", *arguments)
        for a, b in zip(one, other, strict=True):
            assert_exact(a.isnan(), ~b.isnan(), case, "places left to the other kernel")
        lse = one[1].where(~one[1].isnan(), other[1])
        wanted = batched_windows.forward(q, k, v, ids, 0.3)[1] * LOG2_E
        assert_exact(lse[ids < 0], wanted[ids < 0], case, "lse outside windows")
        assert_same({"lse": lse}, {"lse": wanted}, case)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    shrink_blocks()
    mend_bfloat16()
    mend_scalars()
    main()
