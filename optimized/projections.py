"""`reference/projections.py`: the GEMMs are the library's, so nothing of a module differs but when it is
called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..reference.projections import HeadProjections, apply_rope, split_heads

__all__ = ["HeadProjections", "apply_rope", "are_plain", "is_unwatched", "split_heads"]

WATCHERS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_unwatched(module: nn.Module) -> bool:
    """Whether calling `module` is its forward and nothing else: no hooks, no forward put over its own."""
    return "forward" not in module.__dict__ and not any(getattr(module, name) for name in WATCHERS)


def are_plain(linears: list[nn.Module], dtype: torch.dtype | None = None) -> bool:
    """Whether each is torch's own nn.Linear, unwatched, over contiguous tensors, so that an operator may read
    weight and bias itself. Adapted, quantised, sharded or offloaded ones are not: those must be called.

    Args:
        linears: the modules.
        dtype: what weights must have; None = any float dtype.
    """
    return all(
        type(linear) is nn.Linear
        and is_unwatched(linear)
        and all(is_plain(tensor, dtype) for tensor in (linear.weight, linear.bias) if tensor is not None)
        for linear in linears
    )


def is_plain(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether it is a tensor and no subclass, on a device, contiguous, and of this dtype."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16) if dtype is None else (dtype,)
    own = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
    return own and tensor.is_contiguous() and tensor.dtype in kinds
