"""How every operator reports a bad argument: `where: what must hold, got what; what to do`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require(holds: bool, where: str, must: str, got: Any, hint: str = "") -> None:
    """Raise `ValueError("where: must, got …; hint")` unless `holds`."""
    if not holds:
        raise ValueError(f"{where}: {must}, got {got}" + (f"; {hint}" if hint else ""))


def require_shape(where: str, name: str, tensor: Tensor, shape: Sequence[int | None], letters: str) -> None:
    """Check `tensor` against `shape`; None entries are free. `letters` names the axes in the message."""
    require(isinstance(tensor, Tensor), where, f"{name} must be a tensor ({letters})", type(tensor).__name__)
    matches = tensor.ndim == len(shape) and all(
        wanted is None or wanted == size for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not matches:  # a compiler may know sizes by letters only, which have no text
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        require(False, where, f"{name} must have shape ({letters}) = ({wanted})", tuple(tensor.shape))


def require_groups(where: str, heads: int, groups: int) -> None:
    """Heads must be shared out evenly over groups."""
    if groups < 1 or heads % groups:
        require(False, where, "heads must be a multiple of groups", f"H={heads}, G={groups}")


def require_float(where: str, **tensors: Tensor | None) -> None:
    """Every given tensor must be real floating point, and all must be on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        require(isinstance(tensor, Tensor), where, f"{name} must be a tensor", type(tensor).__name__)
        require(tensor.dtype in FLOAT_DTYPES, where, f"{name} must be a float tensor", tensor.dtype)
    require_one_device(where, **given)


def require_one_device(where: str, **tensors: Tensor | None) -> None:
    """All given tensors must be on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        require(False, where, "all tensors must be on one device", listing)


def require_mask(where: str, name: str, mask: Tensor | None, shape: Sequence[int], letters: str) -> None:
    """A mask is None or a bool tensor of `shape`, True = takes part."""
    if mask is None:
        return
    require_shape(where, name, mask, shape, letters)
    require(mask.dtype == torch.bool, where, f"{name} must be bool, True = takes part", mask.dtype)


def require_int64(
    where: str, name: str, tensor: Tensor | None, shape: Sequence[int | None], letters: str
) -> None:
    """An index tensor is None or an int64 tensor of `shape`."""
    if tensor is None:
        return
    require_shape(where, name, tensor, shape, letters)
    require(tensor.dtype == torch.int64, where, f"{name} must be int64", tensor.dtype)
