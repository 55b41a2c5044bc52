"""Products of one input with several weights, each with or without an adapter of low rank; their gradients.

Letters: n tokens, D columns of the input, F of an output, r rank of an adapter, s its scale.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ                                                                         (1)
    x̄ = Σ ȳ W + s (ȳ B) A      Ā = s (ȳ B)ᵀ x      B̄ = s ȳᵀ (x Aᵀ)      W̄ = ȳᵀ x      b̄ = Σ_n ȳ        (2)

PEFT computes (1) in six passes over the tokens and, where adapters are float32 under autocast, converts the
input to float32 and back; autograd adds up the terms of x̄ in a pass each. Here sums are made by the products
themselves. The products are the library's on both engines.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .narrow_product import summed_wide


class Part(NamedTuple):
    """One of the weights: W (F, D), b (F,), A (r, D), B (F, r), s."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


class SharedProducts(torch.autograd.Function):
    """Eqs. (1) and (2), in the dtype of x."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scales: list[float], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`tensors` are W, b, A and B of each part."""
        flat, outputs, saved = x.flatten(0, -2), [], []
        for place, scale in enumerate(scales):
            weight, bias, down, up = (
                None if tensor is None else tensor.to(x.dtype)
                for tensor in tensors[4 * place : 4 * place + 4]
            )
            y, inner = F.linear(flat, weight, bias), None
            if down is not None:
                inner = flat @ down.T  # (n, r)
                y.addmm_(inner, up.T, alpha=scale)
            outputs.append(y.unflatten(0, x.shape[:-1]))
            saved += [weight, down, up, inner]
        ctx.save_for_backward(x, *saved)
        ctx.scales = scales
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Eq. (2); gradients of weights in their dtypes, float32's summed in it."""
        x, *saved = ctx.saved_tensors
        needed, dtypes = ctx.needs_input_grad[2:], ctx.dtypes
        flat, x_grad, found = x.flatten(0, -2), None, []
        for place, (scale, grad) in enumerate(zip(ctx.scales, grads, strict=True)):
            weight, down, up, inner = saved[4 * place : 4 * place + 4]
            needs, kinds = (each[4 * place : 4 * place + 4] for each in (needed, dtypes))
            grad = grad.flatten(0, -2)
            pulled = None if down is None else scaled(grad @ up, scale)  # (n, r)
            if ctx.needs_input_grad[0]:
                x_grad = grad @ weight if x_grad is None else x_grad.addmm_(grad, weight)
                if down is not None:
                    x_grad.addmm_(pulled, down)
            found += [
                product_in(kinds[0], grad.T, flat) if needs[0] else None,
                grad.sum(0, dtype=kinds[1]) if needs[1] else None,
                product_in(kinds[2], pulled.T, flat) if needs[2] else None,
                scaled(product_in(kinds[3], grad.T, inner), scale) if needs[3] else None,
            ]
        return None if x_grad is None else x_grad.view(x.shape), None, *found


def product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """left · right in a dtype: float32 of bfloat16 tensors is summed and kept in it."""
    wide = dtype == torch.float32 and left.dtype == torch.bfloat16
    return summed_wide(left, right) if wide else (left @ right).to(dtype)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """`tensor` times `scale`."""
    return tensor if scale == 1 else tensor * scale


def shared_products(x: Tensor, parts: list[Part]) -> tuple[Tensor, ...]:
    """Eq. (1) for each part.

    Args:
        x: (..., D), in the dtype to compute in.
        parts: weights in any float dtype.
    Returns:
        (..., F) each, in the dtype of x.
    """
    tensors = [tensor for part in parts for tensor in part[:4]]
    with torch.autocast(device_type=x.device.type, enabled=False):
        return SharedProducts.apply(x, [part.scale for part in parts], *tensors)
