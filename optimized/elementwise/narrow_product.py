"""Products of the hidden states with a few columns in float32: dt, gate and mix of all tokens at once.

Letters: B batch, L tokens, D width, n columns (two per head and one). A float32 copy of the hidden states
would be twice as large as they are. On a GPU bfloat16 states meet the weight as three bfloat16 parts, whose
sum is the float32 weight bit for bit, in products that are exact and summed in float32:

    W = W₁ + W₂ + W₃        U Wᵀ = U W₁ᵀ + U W₂ᵀ + U W₃ᵀ                                               (1)

A choice of route: the sums are float32's either way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.numerics import accumulation_dtype
from .operator import NarrowGrads, NarrowInputs, NarrowOutputs

ALIGNED = 8  # columns, that rows of all matrices begin where tensor cores load from


def takes_parts(u: Tensor) -> bool:
    """Whether eq. (1) runs here."""
    return u.is_cuda and u.dtype == torch.bfloat16


def forward(inputs: NarrowInputs) -> Tensor:
    """u (B, L, D), weight (n, D), bias (n,) -> u Wᵀ + b, (B, L, n) in the accumulation dtype.

    Without parts each of the products that are put together is made by itself, bit for bit as it would be
    without the others.
    """
    u, weight, bias, sizes = inputs
    wide = accumulation_dtype(u.dtype)
    weight, bias = weight.to(wide), bias.to(wide)
    if not takes_parts(u):
        u, each = u.to(wide), zip(weight.split(sizes), bias.split(sizes), strict=True)
        return torch.cat([F.linear(u, *pair) for pair in each], dim=-1)
    return product_of_parts(u, in_parts(weight, 0).flatten(0, 1), bias)


def product_of_parts(u: Tensor, parts: Tensor, bias: Tensor) -> Tensor:
    """Eq. (1) by parts (3n, D), the first ones before the second ones, and bias (n,): (B, L, n) float32."""
    product = summed_wide(u.flatten(0, 1), parts.T)  # (B·L, 3n)
    columns = product.unflatten(1, (3, -1)).sum(1)[:, : len(bias)]
    return (columns + bias).unflatten(0, u.shape[:2])


def backward(inputs: NarrowInputs, outputs: NarrowOutputs, grads: NarrowOutputs) -> NarrowGrads:
    """Gradients of u, in its dtype, of the weight and of the bias in the accumulation dtype."""
    u, weight, _, _ = inputs
    wide = accumulation_dtype(u.dtype)
    grad, weight, flat = grads.product.to(wide).flatten(0, 1), weight.to(wide), u.flatten(0, 1)
    bias_grad = grad.sum(0)
    if not takes_parts(u):
        return NarrowGrads((grad @ weight).to(u.dtype).view(u.shape), grad.T @ flat.to(wide), bias_grad)
    grad_parts, weights = in_parts(grad, 1), in_parts(weight, 0)
    # all but products of two second parts, which lie below the last bit of the result's dtype
    pairs = [(0, 0), (0, 1), (1, 0)]
    left, right = (
        torch.cat([parts[pair[side]] for pair in pairs], dim=1 - side)
        for side, parts in enumerate((grad_parts, weights))
    )
    weight_grad = summed_wide(torch.cat(grad_parts.unbind(), dim=1).T, flat).unflatten(0, (3, -1)).sum(0)
    return NarrowGrads((left @ right).view(u.shape), weight_grad[: len(weight)], bias_grad)


def in_parts(wide: Tensor, dim: int, at: int = 0) -> Tensor:
    """Three bfloat16 tensors whose sum is `wide`, float32, along a new axis `at`, not after `dim`; zeros at
    the end of `dim` fill it up to a multiple of `ALIGNED`.
    """
    shape = list(wide.shape)
    shape[dim] += -shape[dim] % ALIGNED
    parts = wide.new_zeros(*shape[:at], 3, *shape[at:], dtype=torch.bfloat16)
    first, second, third = parts.narrow(dim + 1, 0, wide.shape[dim]).unbind(at)
    first.copy_(wide)
    rest = wide - first  # in float32, exactly
    second.copy_(rest)
    third.copy_(rest - second)
    return parts


def summed_wide(left: Tensor, right: Tensor) -> Tensor:
    """left · right in float32, from bfloat16; the CPU's products have no such result."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
