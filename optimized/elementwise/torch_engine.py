"""The torch engine of RoPE and of the mix of the two branches, and their gradients.

Letters: B batch, L tokens, D width, N head dim. Halves a, b of a head, and their gradients:

    a' = a cos₁ - b sin₁    b' = b cos₂ + a sin₂       ā = ā' cos₁ + b̄' sin₂    b̄ = b̄' cos₂ - ā' sin₁    (1)

A token of vision has a row of Local-Swin's output, text has none. With s the product before the sigmoid, f
Flex-MA's output and l the token's row of Local-Swin's, on vision

    m = sigmoid(s)    y = m f + (1 - m) l        f̄ = m ȳ    l̄ = (1 - m) ȳ    s̄ = m (1 - m) Σ_D ȳ (f - l)   (2)

and y = f, f̄ = ȳ, s̄ = 0 on text; l̄ = 0 in rows that no token has, whatever l holds there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..layout.tokens import gather_tokens
from .operator import (
    AddNormInputs,
    AddNormOutputs,
    GateGrads,
    GateInputs,
    GateOutputs,
    HeadsInputs,
    MixGrads,
    MixInputs,
    MixOutputs,
    NormGrads,
    NormInputs,
    NormOutputs,
    RotateGrads,
    RotateInputs,
    RotateOutputs,
)


def rotate(inputs: RotateInputs) -> Tensor:
    """Eq. (1), left, or right if `backward`."""
    x, cos, sin, token, backward, _ = inputs
    if token is not None:
        cos, sin = angles_of(cos, token), angles_of(sin, token)
    wide = x.to(accumulation_dtype(x.dtype))
    cos, sin = (angle.to(wide.dtype)[:, :, None] for angle in (cos, sin))
    turned = wide * sin if backward else wide
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat([second, -first] if backward else [-second, first], dim=-1)
    return (wide * cos + (rotated if backward else rotated * sin)).to(x.dtype)


def rotate_backward(inputs: RotateInputs, outputs: RotateOutputs, grads: RotateOutputs) -> RotateGrads:
    """The gradient of y, which stands in the place of x, rotated back."""
    return RotateGrads(rotate(inputs._replace(backward=not inputs.backward)))


def angles_of(angle: Tensor, token: Tensor) -> Tensor:
    """(B or 1, L, N) at the places (n,) of the flattened batch -> (1, n, N)."""
    return gather_tokens(angle, token if len(angle) > 1 else token % angle.shape[1])[None]


def mix(inputs: MixInputs) -> Tensor:
    """Eq. (2), left."""
    flex, local, logit, row, _ = inputs
    share = torch.sigmoid(logit)
    mixed = share * flex + (1 - share) * local_rows(local, row)
    return torch.where(row[..., None] >= 0, mixed.to(flex.dtype), flex)


def scale_heads(inputs: HeadsInputs) -> Tensor:
    """[m f, (1 - m) l]."""
    flex, local, logit, row, _ = inputs
    seen, share = row[:, None] >= 0, torch.sigmoid(logit)
    parts = torch.where(seen, share * flex, flex), torch.where(seen, (1 - share) * local, 0)
    return torch.cat(parts, dim=1).to(flex.dtype)


def mix_backward(inputs: MixInputs, outputs: MixOutputs, grads: MixOutputs) -> MixGrads:
    """Eq. (2), right; the gradients of flex and logit in the dtype of `logit`."""
    flex, local, logit, row, _ = inputs
    vision, share = row[..., None] >= 0, torch.sigmoid(logit)
    grad = grads.y.to(logit.dtype)
    through = (grad * (flex.to(grad.dtype) - local_rows(local, row).to(grad.dtype))).sum(-1, keepdim=True)
    local_grad = local.new_zeros(local.flatten(0, -2).shape[0] + 1, local.shape[-1])
    where = row.flatten() % len(local_grad)  # text goes to the last one, which is cut off
    local_grad[where] = ((1 - share) * grad).to(local.dtype).flatten(0, 1)
    return MixGrads(
        torch.where(vision, share * grad, grad),
        local_grad[:-1].view(local.shape),
        torch.where(vision, share * (1 - share) * through, 0),
    )


def local_rows(local: Tensor, row: Tensor) -> Tensor:
    """Each token's row of `local` (..., D), (B, L, D); any row on text."""
    return gather_tokens(local.flatten(0, -2)[None], row.clamp_min(0).flatten()).view(*row.shape, -1)


def add_norm(inputs: AddNormInputs) -> AddNormOutputs:
    """As Hugging Face's layers compute it, each step rounded where they round it."""
    x, more, weight, eps, _ = inputs
    total = x if more is None else x + more
    wide = total.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return AddNormOutputs(x.new_empty(0) if more is None else total, weight * wide.to(x.dtype))


def gate_product(inputs: GateInputs) -> Tensor:
    """Likewise."""
    return F.silu(inputs.gate) * inputs.up


def norm(inputs: NormInputs) -> Tensor:
    """Likewise."""
    return add_norm(AddNormInputs(inputs.x, None, inputs.weight, inputs.eps)).normed


def norm_backward(inputs: NormInputs, outputs: NormOutputs, grads: NormOutputs) -> NormGrads:
    """With g the gradient of x / rms, as autograd has it, x̄ = (g - x mean(g x) / rms²) / rms."""
    wide, grad = inputs.x.float(), (grads.y * inputs.weight).float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + inputs.eps)
    along = (grad * wide).mean(-1, keepdim=True)
    return NormGrads(scale * (grad - wide * (scale * scale * along)))


def gate_product_backward(inputs: GateInputs, outputs: GateOutputs, grads: GateOutputs) -> GateGrads:
    """As autograd's: the gradient of silu(gate) is rounded before it goes on."""
    gate, up, _ = inputs
    wide = gate.to(accumulation_dtype(gate.dtype))
    opening = torch.sigmoid(wide)
    slope = opening * (1 + wide * (1 - opening))
    return GateGrads((grads.y * up).to(wide.dtype) * slope, grads.y * F.silu(gate))
