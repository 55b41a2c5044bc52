"""`reference/window_attention.py`, fast: one registered operator per pass, on the engine of the tensors.

Letters: B batch, L tokens, H query heads, G groups, N head dim of q and k, P head dim of v.
`batched_windows.py` has the equations and the torch engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.window_attention import check_window_attention
from . import batched_windows
from .engine import choose_engine
from .precision import accumulation_dtype, without_autocast


@without_autocast
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, *, scale: float | None = None
) -> Tensor:
    """`linmu.reference.window_attention`: arguments, result and errors are the same."""
    check_window_attention("window_attention", q, k, v, window_id)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return attention_operator(q, k, v, window_id, scale)[0]


@torch.library.custom_op("linmu::window_attention", mutates_args=())
def attention_operator(
    q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """o, and the logarithm of softmax's denominator, (B, L, H), that the backward pass starts from."""
    choose_engine("window_attention", q, q.shape[-1], v.shape[-1])
    return batched_windows.forward(q, k, v, window_id, scale)


@attention_operator.register_fake
def _(q, k, v, window_id, scale):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    return o, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("linmu::window_attention_backward", mutates_args=())
def attention_backward_operator(
    o_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_id: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their dtypes."""
    choose_engine("window_attention", q, q.shape[-1], v.shape[-1])
    return batched_windows.backward(o_grad, q, k, v, window_id, scale)


@attention_backward_operator.register_fake
def _(o_grad, q, k, v, window_id, o, lse, scale):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, window_id, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, window_id, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, o_grad: Tensor | None, _):
    if o_grad is None:
        return (None,) * 5
    return *attention_backward_operator(o_grad, *ctx.saved_tensors, ctx.scale), None, None


attention_operator.register_autograd(_gradients, setup_context=_save)
