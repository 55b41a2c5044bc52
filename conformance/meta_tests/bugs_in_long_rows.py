"""Bugs that begin at a whole chunk: what lies before one without any token is lost, or digits are.

Each takes the optimized operator's arguments by name, and changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from linmu import optimized, reference

from ..harness import second_formulation
from ..harness.backends import Backend
from ..harness.packed_rows import PackedCase, sample_by_sample
from ..properties import test_bidirectional_scan, test_causal_conv, test_scan, test_scan_step
from .planting import BUGS, Bug

MASKS = {
    "selective_scan": "mask",
    "bidirectional_scan": "valid",
    "causal_conv": "mask",
    "sliding_window_attention": "valid",
}


def empty_chunks_before(there: Tensor, size: int) -> Tensor:
    """(B, L) int64: how many chunks of `size` tokens, none of them `there`, come before each token."""
    padded = torch.nn.functional.pad(there, (0, -there.shape[1] % size))
    empty = ~padded.unflatten(1, (-1, size)).any(2)
    return (empty.cumsum(1) - empty.long()).repeat_interleave(size, 1)[:, : there.shape[1]]


def starts_anew(operator: str, size: int, **given: Any) -> Any:
    """Behind a chunk without valid tokens a row begins again, as a sample does."""
    mask = given[MASKS[operator]]
    if mask is not None:
        before = empty_chunks_before(mask, size)
        sequence = given.get("sequence")
        given["sequence"] = before if sequence is None else 1000 * sequence + before
    return getattr(optimized, operator)(**given)


def reverse_starts_anew(size: int, module: Any = optimized, **given: Any) -> Any:
    """The same of the reverse scan alone, behind a chunk without vision, counted from the end of the row."""
    segment, valid = given["segment"], given["valid"]
    vision = segment >= 0 if valid is None else (segment >= 0) & valid
    behind = empty_chunks_before(vision.flip(1), size).flip(1)
    given["segment"] = torch.where(segment >= 0, 1000 * segment + behind, segment)
    return module.bidirectional_scan(**given)


def gates_alone_count(size: int, **given: Any) -> Any:
    """In such a chunk nobody sends a gradient to the reverse scan's tokens behind it."""
    whole, apart = optimized.bidirectional_scan(**given), reverse_starts_anew(size, **given)
    return tuple(a.detach() + (b - b.detach()) for a, b in zip(whole, apart, strict=True))


def windows_end(size: int, q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, **given: Any) -> Tensor:
    """A window has another id behind a block that holds none of its tokens."""
    ids = window_id.clone()
    for number in window_id[window_id >= 0].unique():
        behind = empty_chunks_before(window_id == number, size)
        ids = torch.where(window_id == number, 1000 * number + behind, ids)
    return optimized.window_attention(q, k, v, ids, **given)


def unasked_blocks_are_left_out(size: int, *, asks: Tensor | None, **given: Any) -> Any:
    """Keys of a block where nobody asks are not read."""
    if asks is not None:
        block = torch.arange(asks.shape[1]) // size
        asked = torch.stack([torch.isin(block, block[row]) for row in asks])
        o, _ = optimized.sliding_window_attention(asks=asks, **given | {"valid": asked})
        return o, optimized.sliding_window_attention(asks=asks, **given)[1]
    return optimized.sliding_window_attention(asks=asks, **given)


AT_A_GAP: dict[str, tuple[Callable, ...]] = {
    "selective_scan": (partial(starts_anew, "selective_scan"),),
    "bidirectional_scan": (
        partial(starts_anew, "bidirectional_scan"),
        reverse_starts_anew,
        gates_alone_count,
    ),
    "causal_conv": (partial(starts_anew, "causal_conv"),),
    "window_attention": (windows_end,),
    "sliding_window_attention": (
        partial(starts_anew, "sliding_window_attention"),
        unasked_blocks_are_left_out,
    ),
}


def flex_ma_with(scan: Callable) -> type:
    """The reference's module with another bidirectional scan."""

    class WithBug(reference.FlexMA):
        def forward(self, *args: Any, **given: Any) -> Any:
            def call(x, dt, A, B, C, **rest):
                return scan(module=right, x=x, dt=dt, A=A, B=B, C=C, **rest)

            right = Backend("right", reference)
            of_module = reference.FlexMA.forward.__globals__
            with mock.patch.dict(of_module, bidirectional_scan=call):
                return super().forward(*args, **given)

    return WithBug


def with_sums_of_a_row(case: Any, operator: str, **given: Any) -> Any:
    """Decays are differences of sums that run through a whole row, or sample, in the arguments' dtype."""
    formulation = getattr(second_formulation, operator)

    def alone(*, sequence: Tensor | None = None, **given: Any) -> Any:
        return formulation(**given)

    if isinstance(case, PackedCase):
        return sample_by_sample(alone, case, **given)
    return alone(**given)


def coarse(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).to(tensor.dtype)


def state_in_the_dtype_of_x(name: str, reference: Callable, **given: Any) -> Any:
    """What a half-precision cache does."""
    tokens = given["u" if "u" in given else "x"]
    return reference(**given | {name: coarse(given[name], tokens.dtype)})


def gradient_in_the_dtype_of_x(name: str, reference: Callable, **given: Any) -> Any:
    """The state itself is right."""
    tokens = given["u" if "u" in given else "x"]
    rounded = Rounded.apply(given[name], tokens.dtype)
    return reference(**given | {name: rounded})


class Rounded(torch.autograd.Function):
    """The identity; its gradient is rounded."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return coarse(grad, ctx.dtype), None


def read_in_the_dtype_of_u(reference: Callable, **given: Any) -> Any:
    """The state that is handed on is right."""
    _, state = reference(**given)
    return state_in_the_dtype_of_x("initial_state", reference, **given)[0], state


HANDED_ON = {
    "selective_scan": ("initial_state", test_scan),
    "bidirectional_scan": ("initial_state", test_bidirectional_scan),
    "scan_step": ("state", test_scan_step),
    "causal_conv": ("initial_state", test_causal_conv),
}
for operator, (name, properties) in HANDED_ON.items():
    caught_by = (properties.test_a_state_is_handed_on_in_float32,)
    for change in (state_in_the_dtype_of_x, gradient_in_the_dtype_of_x):
        BUGS.append(Bug(f"{operator}_has_its_{change.__name__}", operator, partial(change, name), caught_by))
BUGS.append(
    Bug(
        "the_state_of_causal_conv_is_read_in_the_dtype_of_u",
        "causal_conv",
        read_in_the_dtype_of_u,
        (test_causal_conv.test_a_state_is_read_in_float32,),
    )
)
