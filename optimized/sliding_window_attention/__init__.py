"""`reference/sliding_window_attention.py`, fast, on the engine of the tensors.

Letters: B batch, L tokens, W window, H query heads, G groups, N head dim of q and k, P head dim of v.

spans             which tokens read which, once for all layers
operator          registration, fakes, gradients
torch_engine      blocks of tokens as matrix products; has the equations
kernels           Triton: an online softmax over the keys of a tile of tokens
kernels_backward  Triton: the gradients
kernels_step      Triton: one token of decoding, the state shifted in its place
kernels_ring      Triton: one token of decoding, the state in a ring among others
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.sliding_window_attention import WindowState, check_sliding_window
from ..engine.once import once_a_forward
from .operator import RingInputs, SlidingInputs, StepInputs, attend, attend_ring, attend_step
from .spans import Spans, find_spans, spans_of_layer

__all__ = [
    "PooledWindowState",
    "Spans",
    "WindowState",
    "attend_spans",
    "find_spans",
    "is_step",
    "sliding_window_attention",
    "spans_of_layer",
    "step_in_place",
    "step_in_ring",
]


class PooledWindowState(NamedTuple):
    """A window's state for one token of text without a gradient, among those of others: rings, overwritten in
    place, see `operator.RingInputs`.

    Args:
        k, v: (R, W, G, N) and (R, W, G, P), each row contiguous.
        present: (R, at least W).
        rows: (B,) int64, which of them is each one's.
        turn: (B,) int64, how many tokens each one has read.
    """

    k: Tensor
    v: Tensor
    present: Tensor
    rows: Tensor
    turn: Tensor


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    asks: Tensor | None = None,
    valid: Tensor | None = None,
    sequence: Tensor | None = None,
    initial_state: WindowState | None = None,
    scale: float | None = None,
) -> tuple[Tensor, WindowState]:
    """`linmu.reference.sliding_window_attention`: arguments, results and errors are the same."""
    check_sliding_window("sliding_window_attention", q, k, v, window, asks, valid, sequence, initial_state)
    if is_step(q, k, v, window, initial_state):
        k_before, v_before, present = initial_state
        own = WindowState(owned(k_before, k.dtype), owned(v_before, v.dtype), present)
        return step_in_place(q, k, v, own, asks=asks, valid=valid, scale=scale)
    present = None if initial_state is None else initial_state.present
    spans = find_spans(window, q.shape[1], asks, valid, sequence, present)
    return attend_spans(q, k, v, window, spans, initial_state=initial_state, scale=scale)


def attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    spans: Spans,
    *,
    initial_state: WindowState | None = None,
    scale: float | None = None,
    engine: str | None = None,
) -> tuple[Tensor, WindowState]:
    """`sliding_window_attention` with its spans found before: they serve any number of layers and passes."""
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if initial_state is not None:
        k = torch.cat([initial_state.k.to(k.dtype), k], dim=1)
        v = torch.cat([initial_state.v.to(v.dtype), v], dim=1)
    o, _ = attend(SlidingInputs(q, k, v, *spans[:4], window, scale, engine))
    return o, state_after(k, v, spans.valid, spans.last, window)


def state_after(k: Tensor, v: Tensor, valid: Tensor | None, last: Tensor | None, window: int) -> WindowState:
    """The last W - 1 keys and values, in memory of their own."""
    if last is not None:

        def places() -> tuple[Tensor, Tensor, Tensor]:
            return torch.arange(k.shape[0], device=k.device)[:, None], last.clamp_min(0), last >= 0

        row, place, present = once_a_forward(("last", window), places)
        kept = [tensor[row, place] for tensor in (k, v)]
    else:
        missing = max(window - 1 - k.shape[1], 0)
        end = slice(k.shape[1] - (window - 1 - missing), None)

        def present_at_end() -> Tensor:
            there = k.new_ones(k.shape[:2], dtype=torch.bool) if valid is None else valid
            return F.pad(there[:, end], (missing, 0))

        present = once_a_forward(("at end", window), present_at_end)
        kept = [F.pad(tensor[:, end], (0, 0, 0, 0, missing, 0)) for tensor in (k, v)]  # copies in any case
        if valid is None:
            return WindowState(*kept, present)
    absent = once_a_forward(("absent", window), lambda: ~present[..., None, None])
    return WindowState(*(tensor.masked_fill_(absent, 0) for tensor in kept), present)


def step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: WindowState,
    *,
    asks: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    engine: str | None = None,
) -> tuple[Tensor, WindowState]:
    """`sliding_window_attention` of one token, without a gradient, that overwrites the state's k and v.

    They must be contiguous and in the dtypes of k and v; the caller goes on with the state that is returned.
    """
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    asks, valid = (None if mask is None else mask[:, 0] for mask in (asks, valid))
    inputs = StepInputs(q[:, 0], k[:, 0], v[:, 0], *state, asks, valid, scale, engine)
    o, present = attend_step(inputs)
    return o[:, None], WindowState(state.k, state.v, present)


def step_in_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: tuple[Tensor, Tensor],
    state: PooledWindowState,
    *,
    valid: Tensor | None = None,
    engine: str | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `step_in_place`, before RoPE of q and k by angles (B, 1, N), in rings of a pool: (B, 1, H, P).

    `into`: `RingInputs`'s logit and out, if it is to be scaled and to stand there.
    """
    new, valid = (q[:, 0], k[:, 0], v[:, 0]), None if valid is None else valid[:, 0]
    cos, sin = (angle[:, 0].expand(len(q), -1) for angle in angles)
    inputs = RingInputs(*new, cos, sin, *state, valid, q.shape[3] ** -0.5, engine)
    if into is None:
        return attend_ring(inputs)[:, None]
    attend_ring(inputs._replace(logit=into[0], out=into[1]))
    return into[1].unflatten(1, (q.shape[2], -1))[:, None]


def owned(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def is_step(q: Tensor, k: Tensor, v: Tensor, window: int, state: WindowState | None) -> bool:
    """Whether this is one token after others that autograd does not follow: what `step_in_place` takes."""
    if state is None or window == 1 or q.shape[1] != 1:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, state.k, state.v)))
