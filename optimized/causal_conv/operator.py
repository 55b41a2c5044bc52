"""The registered operators of the causal convolution, of one tensor and of Flex-MA's three: a forward and a
backward pass each, on their tensors' engine, as in `operators`.
"""

from __future__ import annotations

from torch import Tensor

from ..engine import choose_engine
from ..engine.operator import operator
from ..precision import accumulation_dtype
from ..scan.operator import empty_like_inputs, in_place_of, kernels, like_inputs
from . import torch_engine as conv
from .torch_engine import by_part, joined


def _engine(u: Tensor, kernel_module: str):
    return conv if choose_engine("causal_conv", u) == "torch" else kernels(kernel_module)


@operator("causal_conv")
def causal_conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and the last K-1 valid inputs times `scale`, which is on u; place i is token order[i] of u."""
    return _engine(u, "causal_conv.kernels").forward(u, weight, bias, mask, initial_state, order, scale)


@causal_conv.register_fake
def _(u, weight, bias, mask, initial_state, order, scale):
    final_state = u.new_empty(u.shape[0], weight.shape[1] - 1, u.shape[2], dtype=accumulation_dtype(u.dtype))
    return u.new_empty(u.shape), final_state


@operator("causal_conv_backward")
def causal_conv_backward(
    out_grad: Tensor,
    final_grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """The gradients of u, weight and of those of bias, initial_state that are there."""
    grads = _engine(u, "causal_conv.kernels_backward").gradient(
        out_grad, final_grad, u, weight, bias, mask, initial_state, order, scale
    )
    return like_inputs(grads, (u, weight, bias, initial_state))


@causal_conv_backward.register_fake
def _(out_grad, final_grad, u, weight, bias, mask, initial_state, order, scale):
    return empty_like_inputs((u, weight, bias, initial_state))


def _save_conv(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _causal_conv_gradients(ctx, out_grad: Tensor, final_grad: Tensor):
    inputs = ctx.saved_tensors
    grads = causal_conv_backward(out_grad, final_grad, *inputs, ctx.scale)
    return *in_place_of(inputs, grads, without=(3, 5)), None


causal_conv.register_autograd(_causal_conv_gradients, setup_context=_save_conv)


@operator("convolve_heads")
def convolve_heads(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`causal_conv` of x, B and C, (B, L, ·, ·) each, and its state; `scale` is on C.

    Weight, bias and state hold their channels one after the other. Side by side in one tensor, C scaled
    before, the three would be written and read once more: 32 KB per token of width 3584.
    """
    heads = (x, B, C)
    parts = [tensor.flatten(2) for tensor in heads]
    given = (weight, bias, mask, initial_state, order, (1.0, 1.0, scale))
    outs, final_state = _engine(x, "causal_conv.kernels").forward_parts(parts, *given)
    return *(out.view(like.shape) for out, like in zip(outs, heads, strict=True)), final_state


@convolve_heads.register_fake
def _(x, B, C, weight, bias, mask, initial_state, order, scale):
    shape = x.shape[0], weight.shape[1] - 1, weight.shape[0]
    outs = (tensor.new_empty(tensor.shape) for tensor in (x, B, C))
    return *outs, x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


@operator("convolve_heads_backward")
def convolve_heads_backward(
    out_grads: list[Tensor],
    final_grad: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """The gradients of x, B, C, weight and of those of bias, initial_state that are there."""
    heads = (x, B, C)
    sizes = [tensor.shape[2] * tensor.shape[3] for tensor in heads]
    given = zip(
        (grad.flatten(2) for grad in out_grads),
        by_part(final_grad, sizes, 2),
        (tensor.flatten(2) for tensor in heads),
        by_part(weight, sizes, 0),
        by_part(bias, sizes, 0),
        by_part(initial_state, sizes, 2),
        (1.0, 1.0, scale),
        strict=True,
    )
    gradient = _engine(x, "causal_conv.kernels_backward").gradient
    found = [gradient(*each, mask, start, order, factor) for *each, start, factor in given]
    grads, *shared = zip(*found, strict=True)
    grads = (grad.view(like.shape) for grad, like in zip(grads, heads, strict=True))
    shared = (joined(parts, dim) for parts, dim in zip(shared, (0, 0, 2), strict=True))
    return like_inputs((*grads, *shared), (*heads, weight, bias, initial_state))


@convolve_heads_backward.register_fake
def _(out_grads, final_grad, x, B, C, weight, bias, mask, initial_state, order, scale):
    return empty_like_inputs((x, B, C, weight, bias, initial_state))


def _convolve_heads_gradients(ctx, *out_grads: Tensor):
    *out_grads, final_grad = out_grads
    inputs = ctx.saved_tensors
    grads = convolve_heads_backward(out_grads, final_grad, *inputs, ctx.scale)
    return *in_place_of(inputs, grads, without=(5, 7)), None


convolve_heads.register_autograd(_convolve_heads_gradients, setup_context=_save_conv)
