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

from linmu.optimized.layout.plan import window_plan
from linmu.optimized.window_attention import kernels, kernels_backward, torch_engine
from linmu.optimized.window_attention.operator import AttentionInputs, AttentionOutputs
from linmu.optimized.window_attention.tiles import LOG2_E

from ....harness.compare import assert_exact, assert_same
from . import mend_bfloat16, mend_scalars, watch_memory
from .trial import shrink_blocks, window_cases

PAIR = ("launch_held", "launch_rest")  # what launches the kernel for blocks of one window, and for the others


def written(left_out: tuple[tuple[str, str], ...], call: Callable, *arguments) -> tuple[Tensor, ...]:
    """What a pass writes without some launches, (launch, kernel): NaN where no other writes."""
    module = sys.modules[call.__module__]

    def others(name: str) -> Callable:
        launch, kernels = getattr(module, name), [getattr(module, of) for at, of in left_out if at == name]
        return lambda of, *rest, **named: None if of in kernels else launch(of, *rest, **named)

    with mock.patch.multiple(module, **{name: others(name) for name in PAIR}), watch_memory():
        return call(*arguments)


def shared(
    case: str, launches: tuple[tuple[str, str], ...], own: slice, call: Callable, *arguments, idle: tuple = ()
) -> list[Tensor]:
    """What two launches give together, without the idle ones of their pass; raises unless each token is
    written by one and not by the other."""
    one, other = (written((launch, *idle), call, *arguments)[own] for launch in launches)
    for a, b in zip(one, other, strict=True):
        assert_exact(a.isnan(), ~b.isnan(), case, f"places left to one of {launches}")
    return [a.where(~a.isnan(), b) for a, b in zip(one, other, strict=True)]


def pair(held: str, rest: str) -> tuple[tuple[str, str], ...]:
    """The launches of two kernels that share the tokens, in the order of the ones to leave out."""
    return (("launch_rest", rest), ("launch_held", held))


def main() -> None:
    """Raises unless each token's results are written once, and those of the torch engine."""
    queries = pair("query_gradient_held_kernel", "query_gradient_kernel")
    keys = pair("key_gradient_kernel", "key_gradient_kernel")
    for number, given in islice(enumerate(window_cases()), 1, None, 2):  # the others have nothing to share
        case, ids = f"case {number} of window_attention", given["window_id"]
        inputs = AttentionInputs(*(given[name].bfloat16() for name in "qkv"), ids, *window_plan(ids), 0.3)
        attend = pair("attend_held_kernel", "attend_kernel")
        o, lse = shared(case, attend, slice(2), kernels.forward, inputs)
        wanted = torch_engine.forward(inputs).lse * LOG2_E
        assert_exact(lse[ids < 0], wanted[ids < 0], case, "lse outside windows")
        assert_same({"lse": lse}, {"lse": wanted}, case)
        grads = AttentionOutputs(torch.randn_like(o), None)
        backward = (kernels_backward.backward, inputs, AttentionOutputs(o, lse), grads)
        shared(case, queries, slice(1), *backward, idle=keys)  # which come after
        shared(case, keys, slice(1, 3), *backward)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    shrink_blocks()
    mend_bfloat16()
    mend_scalars()
    main()
