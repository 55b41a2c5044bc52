"""Sliding-window attention as registered operators: `linmu::sliding_window_attention` and, for one token of
decoding, `linmu::sliding_window_step`, and `linmu::sliding_window_ring` with states among those of others.

Letters: B batch, L tokens, M keys, W window, H query heads, G groups, N head dim of q and k, P head dim of v.
The keys before the tokens are the state's, as in `spans`; `torch_engine` has the equations.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..engine.operator import Engines, Operator, lazy


class SlidingInputs(NamedTuple):
    """What the attention reads.

    Args:
        q, k, v: (B, L, H, N), (B, M, G, N), (B, M, G, P).
        asks, valid, low, high: as in `spans.Spans`.
        window: W.
        scale: factor on q·k.
        engine: "triton" or "torch"; None = by the tensors.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    asks: Tensor | None
    valid: Tensor | None
    low: Tensor | None
    high: Tensor | None
    window: int
    scale: float
    engine: str | None = None


class SlidingOutputs(NamedTuple):
    """o (B, L, H, P) in the dtype of q; lse (B, H, L), the logarithm of softmax's denominator: natural from
    the torch engine, to the base 2 from the kernels.
    """

    o: Tensor
    lse: Tensor


class SlidingGrads(NamedTuple):
    """The gradients of the inputs of the same names."""

    q: Tensor
    k: Tensor
    v: Tensor


def sliding_outputs(inputs: SlidingInputs) -> SlidingOutputs:
    """Shapes and dtypes of the outputs."""
    q = inputs.q
    batch, length, heads, _ = q.shape
    lse = q.new_empty(batch, heads, length, dtype=accumulation_dtype(q.dtype))
    return SlidingOutputs(q.new_empty(batch, length, heads, inputs.v.shape[3]), lse)


attend = Operator(
    "sliding_window_attention",
    SlidingInputs,
    SlidingOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "forward"), lazy(f"{__package__}.kernels", "forward")
    ),
    fake=sliding_outputs,
    head_dims=lambda inputs: (inputs.q.shape[3], inputs.v.shape[3]),
)
attend.has_gradient(
    SlidingGrads,
    Engines(
        lazy(f"{__package__}.torch_engine", "backward"), lazy(f"{__package__}.kernels_backward", "backward")
    ),
    of=("o",),
    saved=("o", "lse"),
)


class StepInputs(NamedTuple):
    """What one token a row reads. There is no gradient.

    Args:
        q, k, v: (B, H, N), (B, G, N), (B, G, P).
        state_k, state_v: (B, W-1, G, N) and (B, W-1, G, P), contiguous, in the dtypes of k and v; they are
            overwritten with the state after the token.
        present: (B, W-1) bool, what there is of the state; W > 1.
        asks, valid: (B,) bool; None = all.
        scale: factor on q·k.
        engine: "triton" or "torch"; None = by the tensors.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    state_k: Tensor
    state_v: Tensor
    present: Tensor
    asks: Tensor | None
    valid: Tensor | None
    scale: float
    engine: str | None = None


class StepOutputs(NamedTuple):
    """o (B, H, P) in the dtype of q, and what is present after the token, (B, W-1) bool."""

    o: Tensor
    present: Tensor


def step_outputs(inputs: StepInputs) -> StepOutputs:
    """Shapes and dtypes of the outputs."""
    q, present = inputs.q, inputs.present
    o = q.new_empty(q.shape[0], q.shape[1], inputs.v.shape[2])
    return StepOutputs(o, present.new_empty(present.shape))


attend_step = Operator(
    "sliding_window_step",
    StepInputs,
    StepOutputs,
    forward=Engines(lazy(f"{__package__}.torch_engine", "step"), lazy(f"{__package__}.kernels_step", "step")),
    fake=step_outputs,
    head_dims=lambda inputs: (inputs.q.shape[2], inputs.v.shape[2]),
    overwrites=("state_k", "state_v"),
)


class RingInputs(NamedTuple):
    """What one token a row reads whose keys and values stand in rings: the one after t others at t mod W, the
    W - 1 before it in the other places. There is no gradient.

    Args:
        q, k, v: (B, H, N), (B, G, N), (B, G, P), before RoPE.
        cos, sin: (B, N), of RoPE.
        ring_k, ring_v: (R, W, G, N) and (R, W, G, P) in the dtypes of k and v, each row contiguous, W > 1:
            the token's take their place there.
        present: (R, at least W) of any dtype, 0 where there is none of ring_k: the token's turns to 1.
        rows: (B,) int64, which row is each one's.
        turn: (B,) int64, how many tokens each one has read before.
        valid: (B,) bool; other rows keep their rings and give 0. None = all.
        scale: factor on q·k.
        engine: "triton" or "torch"; None = by the tensors.
        logit: (B, 1), o is multiplied with one less its sigmoid; None = with 1.
        out: (B, H·P), rows of any stride, in the dtype of q: overwritten with o, and nothing is returned.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    ring_k: Tensor
    ring_v: Tensor
    present: Tensor
    rows: Tensor
    turn: Tensor
    valid: Tensor | None
    scale: float
    engine: str | None = None
    logit: Tensor | None = None
    out: Tensor | None = None


class RingOutputs(NamedTuple):
    """o (B, H, P) in the dtype of q; (0,) if it went elsewhere."""

    o: Tensor


def ring_output(inputs: RingInputs) -> Tensor:
    """What is returned, without values."""
    size = 0 if inputs.out is not None else (*inputs.q.shape[:2], inputs.v.shape[2])
    return inputs.q.new_empty(size)


attend_ring = Operator(
    "sliding_window_ring",
    RingInputs,
    RingOutputs,
    forward=Engines(lazy(f"{__package__}.torch_engine", "ring"), lazy(f"{__package__}.kernels_ring", "ring")),
    fake=ring_output,
    head_dims=lambda inputs: (inputs.q.shape[2], inputs.v.shape[2]),
    overwrites=("ring_k", "ring_v", "present", "out"),
)
