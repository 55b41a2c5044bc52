"""The registered operators of sliding-window attention: forward, backward and one token of decoding.

M keys stand before and at the L tokens, as in `spans`. Each operator runs on the engine of its tensors and is
opaque to torch.compile.
"""

from __future__ import annotations

from torch import Tensor

from ..engine import choose_engine
from ..engine.operator import operator
from ..precision import accumulation_dtype
from . import torch_engine

NAME = "sliding_window_attention"


def engine_of(q: Tensor, v: Tensor) -> str:
    """Of one call."""
    return choose_engine(NAME, q, q.shape[-1], v.shape[-1])


@operator(NAME)
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asks: Tensor | None,
    valid: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (B, L, H, P), and the logarithm of softmax's denominator, (B, H, L), for the backward pass.

    q (B, L, H, N), k (B, M, G, N), v (B, M, G, P); the others as in `spans.Spans`.
    """
    if engine_of(q, v) == "torch":
        return torch_engine.forward(q, k, v, asks, valid, low, window, scale)
    from . import kernels

    return kernels.forward(q, k, v, asks, valid, low, window, scale)


@attend.register_fake
def attend_fake(q, k, v, asks, valid, low, high, window, scale):
    batch, length, heads, _ = q.shape
    lse = q.new_empty(batch, heads, length, dtype=accumulation_dtype(q.dtype))
    return q.new_empty(batch, length, heads, v.shape[3]), lse


@operator(f"{NAME}_backward")
def attend_backward(
    o_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asks: Tensor | None,
    valid: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    if engine_of(q, v) == "torch":
        grads = torch_engine.backward(o_grad, q, k, v, asks, valid, low, lse, window, scale)
    else:
        from . import kernels_backward

        grads = kernels_backward.backward(o_grad, q, k, v, asks, valid, low, high, o, lse, window, scale)
    return tuple(grad.to(tensor.dtype).contiguous() for grad, tensor in zip(grads, (q, k, v), strict=True))


@attend_backward.register_fake
def attend_backward_fake(o_grad, q, k, v, *rest):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v))


def save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def gradients(ctx, o_grad: Tensor, _):
    q_grad, k_grad, v_grad = attend_backward(o_grad, *ctx.saved_tensors, ctx.window, ctx.scale)
    return q_grad, k_grad, v_grad, None, None, None, None, None, None


attend.register_autograd(gradients, setup_context=save_for_backward)


@operator("sliding_window_step", mutates_args={"state_k", "state_v"})
def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state_k: Tensor,
    state_v: Tensor,
    present: Tensor,
    asks: Tensor | None,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token a row: o (B, H, P), and what is `present` afterwards. Without a gradient.

    q (B, H, N), k (B, G, N), v (B, G, P); state_k (B, W-1, G, N) and state_v (B, W-1, G, P), contiguous and
    in the dtypes of k and v, are overwritten with the state after the token; present (B, W-1), W > 1; asks
    and valid (B,) bool.
    """
    if engine_of(q, v) == "torch":
        return torch_engine.step(q, k, v, state_k, state_v, present, asks, valid, scale)
    from . import kernels_step

    return kernels_step.step(q, k, v, state_k, state_v, present, asks, valid, scale)


@attend_step.register_fake
def attend_step_fake(q, k, v, state_k, state_v, present, asks, valid, scale):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), present.new_empty(present.shape)
