"""What the operators compute in: at least float32, whatever the inputs' dtype and whatever autocast says.

Letters: B batch, L tokens, D width, H heads, G groups, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(operator: Callable) -> Callable:
    """Decorator: run `operator` with autocast off on its tensors' device; it chooses its own dtypes."""

    @wraps(operator)
    def wrapped(*args, **kwargs):
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next((tensor.device.type for tensor in tensors), "cpu")
        # Autocast does not exist on the meta device, and switching it off where it is off costs 5 µs a call.
        if device == "meta" or not torch.is_autocast_enabled(device):
            return operator(*args, **kwargs)
        with torch.autocast(device_type=device, enabled=False):
            return operator(*args, **kwargs)

    return wrapped


def zero_where_masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zero masked tokens. Unlike `tensor * mask` this also clears NaN and stops gradients.

    Args:
        tensor: any shape and dtype.
        mask: bool, True = stays; broadcasts against `tensor`.
    Returns:
        The shape of both, in the dtype of `tensor`.
    """
    return torch.where(mask, tensor, tensor.new_zeros(()))


def begins_sample(sequence: Tensor, valid: Tensor | None) -> Tensor:
    """Where a sample of a packed row begins: at a valid token whose id is not that of the valid one before.

    A row's first sample goes on from what was before the row, so it is not said to begin.

    Args:
        sequence: (B, L) int64, which sample a token belongs to; the ids of invalid tokens say nothing.
        valid: (B, L) bool; None = all.
    Returns:
        (B, L) bool.
    """
    valid = torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid
    current = sequence.gather(1, valid.int().argmax(1, keepdim=True)).squeeze(1)  # the first valid token's
    begins = []
    for own, takes_part in zip(sequence.unbind(1), valid.unbind(1), strict=True):
        begins.append(takes_part & (own != current))
        current = torch.where(takes_part, own, current)
    return torch.stack(begins, dim=1)


def last_where(mask: Tensor, size: int, *tensors: Tensor) -> tuple[list[Tensor], Tensor]:
    """The last `size` tokens of each row where `mask` is True, oldest first, behind zeros for missing ones.

    Args:
        mask: (B, L) bool.
        size: at most L.
        tensors: (B, L, ...) each.
    Returns:
        (B, size, ...) of each tensor, and (B, size) bool, which of them there are.
    """
    order = mask.int().argsort(dim=1, stable=True)[:, mask.shape[1] - size :]
    there, row = mask.gather(1, order), torch.arange(len(mask), device=mask.device)[:, None]
    found = [tensor[row, order] for tensor in tensors]
    return [zero_where_masked(t, there.view(*there.shape, *(1,) * (t.ndim - 2))) for t in found], there


def repeat_groups(tensor: Tensor, heads: int) -> Tensor:
    """(B, L, G, ·) -> (B, L, H, ·): head h reads group h // (H/G)."""
    return tensor.repeat_interleave(heads // tensor.shape[2], dim=2)


@without_autocast
def full_precision_linear(u: Tensor, linear: nn.Module) -> Tensor:
    """W u + b in the accumulation dtype of `u`: (B, L, D) -> (B, L, H).

    bf16 keeps 8 bits of dt; over thousands of tokens that error accumulates in the decay. Weights are read
    here only of a plain nn.Linear. Any other module (adapted, quantised, sharded, offloaded) is called.
    """
    dtype = accumulation_dtype(u.dtype)
    weights = {name: p for name, p in linear.named_parameters() if p.is_floating_point() and p.dtype != dtype}
    if not weights:
        return linear(u.to(dtype)).to(dtype)
    if any(type(p) not in (Tensor, nn.Parameter) or p.device != u.device for p in weights.values()):
        return linear(u.to(next(iter(weights.values())).dtype)).to(dtype)  # only the module can read them
    if type(linear) is nn.Linear:
        wide = {name: parameter.to(dtype) for name, parameter in linear.named_parameters()}
        return F.linear(u.to(dtype), **wide)
    wide = {name: parameter.to(dtype) for name, parameter in weights.items()}
    return functional_call(linear, wide, (u.to(dtype),)).to(dtype)


@without_autocast
def rms_norm_per_head(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · y / sqrt(mean(y²) + eps), the mean over P: y (B, L, H, P), w (H·P,) -> the shape and dtype of y."""
    wide = y.to(accumulation_dtype(y.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype).view(y.shape[2:])).to(y.dtype)
