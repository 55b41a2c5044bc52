"""What Flex-MA does with its scan: each head normed, tokens back in their order.

Letters: B batch, L tokens, H heads, P head dim. With y the scan's output in scan order, ŷ the normed one, and
z = w ŷ in token order:

    ŷ = σ y,  σ = (mean(y²) + ε)^-½        ȳ = σ (w z̄ - ŷ mean(ŷ w z̄))        w̄ = Σ ŷ z̄                  (1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....reference.numerics import accumulation_dtype, rms_norm_per_head
from ...layout.tokens import flat_order, gather_tokens
from ..operator import ScanInputs, ScanOutputs, norm_dtype, scan_outputs


def normed(inputs: ScanInputs, y: Tensor, final_state: Tensor) -> ScanOutputs:
    """Eq. (1), left, of the scan's outputs."""
    saved, z = y.new_empty(0, dtype=norm_dtype(y.dtype)), y
    if inputs.norm_weight is not None:
        z = rms_norm_per_head(y, inputs.norm_weight, inputs.eps)
        saved = y.to(saved.dtype) if inputs.save_y else saved
    if inputs.order is not None:
        order = flat_order(inputs.order)
        z = torch.empty_like(z).flatten(0, 1).index_copy_(0, order, z.flatten(0, 1)).view(z.shape)
    return ScanOutputs(z, final_state, saved)


def norm_backward(
    inputs: ScanInputs, outputs: ScanOutputs, grads: ScanOutputs
) -> tuple[Tensor, Tensor | None]:
    """Eq. (1), right: the gradients of y (B, L, H, P), in its dtype and scan order, and of w (H·P,).

    σ is computed from y as it was saved. σ of y before its rounding would not remove all of w z̄ along y, and
    what remains may be small beside that.
    """
    z_grad, y = in_scan_order(y_grad_of(inputs, grads), inputs.order), outputs.y_before_norm
    if inputs.norm_weight is None:
        return z_grad, None
    wide = y.to(accumulation_dtype(y.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + inputs.eps)
    z_grad, normed = z_grad.to(wide.dtype), wide * scale
    weighed = z_grad * inputs.norm_weight.to(wide.dtype).view(y.shape[2:])
    y_grad = scale * (weighed - normed * (normed * weighed).mean(-1, keepdim=True))
    return y_grad.to(y.dtype), (normed * z_grad).sum((0, 1)).flatten()


def y_grad_of(inputs: ScanInputs, grads: ScanOutputs) -> Tensor:
    """The gradient of the operator's y, in token order; zeros if nothing depends on it."""
    return torch.zeros_like(scan_outputs(inputs).y) if grads.y is None else grads.y


def in_scan_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    """(B, L, ·, ·) in token order -> in scan order."""
    return tensor if order is None else gather_tokens(tensor, flat_order(order)).view(tensor.shape)
