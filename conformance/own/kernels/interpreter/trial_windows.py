"""Run the pairs of kernels that share the tokens of window attention's passes in the interpreter, one without
the other. Started by test_kernels.py.

    TRITON_INTERPRET=1 python trial_windows.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import islice
from unittest import mock

import torch
from torch import Tensor

from linmu.optimized.layout import plan as window_plan
from linmu.optimized.window_attention import (
    kernels as window_kernels,
)
from linmu.optimized.window_attention import (
    kernels_backward as window_gradients,
)
from linmu.optimized.window_attention import (
    torch_engine as batched_windows,
)
from linmu.optimized.window_attention.tiles import LOG2_E

from ....harness.compare import assert_exact, assert_same
from . import mend_bfloat16, mend_scalars, watch_memory
from .trial import shrink_blocks, window_cases

FORWARD = ("attend_kernel", "attend_held_kernel", slice(2))  # and which results are theirs
KEYS = ("key_gradient_kernel", "key_gradient_held_kernel", slice(1, 3))
QUERIES = ("query_gradient_kernel", "query_gradient_held_kernel", slice(1))


def written(left_out: tuple[str, ...], call: Callable, *arguments) -> tuple[Tensor, ...]:
    """What a pass writes without some of its kernels: NaN where no other writes."""
    module = sys.modules[call.__module__]
    kernels = [getattr(module, name) for name in left_out]

    def others(launch: Callable) -> Callable:
        return lambda of, *rest, **named: None if of in kernels else launch(of, *rest, **named)

    launches = {name: others(getattr(module, name)) for name in ("launch_held", "launch_rest")}
    with mock.patch.multiple(module, **launches), watch_memory():
        return call(*arguments)


def shared(
    case: str, kernels: tuple[str, str, slice], call: Callable, *arguments, idle: tuple[str, ...] = ()
) -> list[Tensor]:
    """What two kernels give together, without the idle ones of their pass; raises unless each token is
    written by one and not by the other."""
    *names, own = kernels
    one, other = (written((name, *idle), call, *arguments)[own] for name in names)
    for a, b in zip(one, other, strict=True):
        assert_exact(a.isnan(), ~b.isnan(), case, f"places left to one of {names}")
    return [a.where(~a.isnan(), b) for a, b in zip(one, other, strict=True)]


def main() -> None:
    """Raises unless each token's results are written once, and those of the torch engine."""
    for number, given in islice(enumerate(window_cases()), 1, None, 2):  # the others have nothing to share
        case, ids = f"case {number} of window_attention", given["window_id"]
        q, k, v = (given[name].bfloat16() for name in "qkv")
        plan = window_plan.window_plan(ids)
        o, lse = shared(case, FORWARD, window_kernels.forward, q, k, v, *plan, 0.3)
        wanted = batched_windows.forward(q, k, v, ids, 0.3)[1] * LOG2_E
        assert_exact(lse[ids < 0], wanted[ids < 0], case, "lse outside windows")
        assert_same({"lse": lse}, {"lse": wanted}, case)
        backward = (window_gradients.backward, torch.randn_like(o), q, k, v, *plan, o, lse, 0.3)
        shared(case, QUERIES, *backward, idle=KEYS[:2])  # which come after
        shared(case, KEYS, *backward)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    shrink_blocks()
    mend_bfloat16()
    mend_scalars()
    main()
