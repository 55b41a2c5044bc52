"""`linmu.reference.precision`; where autocast is off already, turning it off costs the host 5 µs a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ..reference.precision import accumulation_dtype

__all__ = ["accumulation_dtype", "without_autocast"]


def without_autocast(operator: Callable) -> Callable:
    """Run `operator` with autocast off on the device of its tensors: it chooses its own dtypes."""

    @wraps(operator)
    def wrapped(*args, **kwargs):
        device = device_type(*args, **kwargs)
        if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know shapes alone
            return operator(*args, **kwargs)
        with torch.autocast(device_type=device, enabled=False):
            return operator(*args, **kwargs)

    return wrapped


def device_type(*args, **kwargs) -> str:
    """Of the first tensor, or the CPU."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"
