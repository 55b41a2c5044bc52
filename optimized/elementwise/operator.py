"""The registered operators of a block around its scan and its attention: products with a few columns, RoPE,
the mix of the branches. As in `operators`: a forward and a backward pass each, on their tensors' engine.
"""

from __future__ import annotations

from torch import Tensor

from ..engine import choose_engine
from ..engine.operator import operator
from ..precision import accumulation_dtype
from ..scan.operator import empty_like_inputs, kernels, like_inputs, save_inputs
from . import narrow_product as narrow
from . import torch_engine as mixing
from . import torch_rope as rope


@operator("narrow_product")
def narrow_product(u: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
    """u Wᵀ + b in the accumulation dtype: (B, L, D), (n, D), (n,) -> (B, L, n), n the sum of `sizes`."""
    return narrow.forward(u, weight, bias, sizes)


@narrow_product.register_fake
def _(u, weight, bias, sizes):
    return u.new_empty(*u.shape[:2], weight.shape[0], dtype=accumulation_dtype(u.dtype))


@operator("narrow_product_backward")
def narrow_product_backward(grad: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The gradients of u, weight and bias."""
    return like_inputs(narrow.gradient(grad, u, weight), (u, weight, bias))


@narrow_product_backward.register_fake
def _(grad, u, weight, bias):
    return empty_like_inputs((u, weight, bias))


def _narrow_gradients(ctx, grad: Tensor):
    return *narrow_product_backward(grad, *ctx.saved_tensors), None


def _save_product(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


narrow_product.register_autograd(_narrow_gradients, setup_context=_save_product)


@operator("mix_branches")
def mix_branches(flex: Tensor, local: Tensor, logit: Tensor, row: Tensor) -> Tensor:
    """The branches' outputs mixed on vision, whose tokens have a row of `local` each; Flex-MA's on text."""
    return _mixing(flex).forward(flex, local, logit, row)


@mix_branches.register_fake
def _(flex, local, logit, row):
    return flex.new_empty(flex.shape)


@operator("mix_branches_backward")
def mix_branches_backward(
    grad: Tensor, flex: Tensor, local: Tensor, logit: Tensor, row: Tensor
) -> list[Tensor]:
    """The gradients of both branches and of the product before the sigmoid."""
    return like_inputs(_mixing(flex).gradient(grad, flex, local, logit, row), (flex, local, logit))


@mix_branches_backward.register_fake
def _(grad, flex, local, logit, row):
    return empty_like_inputs((flex, local, logit))


def _mixing(flex: Tensor):
    return mixing if choose_engine("mix_branches", flex) == "torch" else kernels("elementwise.kernels")


def _mix_gradients(ctx, grad: Tensor):
    return *mix_branches_backward(grad, *ctx.saved_tensors), None


mix_branches.register_autograd(_mix_gradients, setup_context=save_inputs)


@operator("rotate")
def rotate(x: Tensor, cos: Tensor, sin: Tensor, token: Tensor | None, backward: bool) -> Tensor:
    """RoPE on (B, L, heads, N), or what its gradient makes of one; the angles have none.

    With `token`, x are those tokens of a flattened batch.
    """
    module = rope if choose_engine("apply_rope", x) == "torch" else kernels("elementwise.rope_kernels")
    return module.rotate(x, cos, sin, token, backward)


@rotate.register_fake
def _(x, cos, sin, token, backward):
    return x.new_empty(x.shape)


def _save_angles(ctx, inputs, output) -> None:
    _, cos, sin, token, ctx.backward = inputs
    ctx.save_for_backward(cos, sin, token)


def _rotate_gradients(ctx, grad: Tensor):
    return rotate(grad, *ctx.saved_tensors, not ctx.backward), None, None, None, None


rotate.register_autograd(_rotate_gradients, setup_context=_save_angles)
