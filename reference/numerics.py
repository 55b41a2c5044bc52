"""What the operators compute in: at least float32, whatever the inputs' dtype and whatever autocast says."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else: what sums and states are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(operator: Callable) -> Callable:
    """Run `operator` with autocast off on the device of its tensors: it chooses its own dtypes."""

    @wraps(operator)
    def wrapped(*args, **kwargs):
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next((tensor.device.type for tensor in tensors), "cpu")
        # It does not know tensors of shapes alone, and to turn it off where it is off costs 5 µs a call.
        if device == "meta" or not torch.is_autocast_enabled(device):
            return operator(*args, **kwargs)
        with torch.autocast(device_type=device, enabled=False):
            return operator(*args, **kwargs)

    return wrapped
