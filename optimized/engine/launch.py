"""What every function that launches Triton kernels needs around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

from ..precision import without_autocast

HOPPER = 227 * 1024


def launching(function: Callable) -> Callable:
    """Run `function` with autocast off and the GPU of its first tensor current, which Triton launches on."""
    plain = without_autocast(function)

    @wraps(function)
    def wrapped(*args, **kwargs):
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return plain(*args, **kwargs)
        with torch.cuda.device_of(first):
            return plain(*args, **kwargs)

    return wrapped


def ceil_div(number: int, by: int) -> int:
    """As `triton.cdiv`, which takes the host ten times as long."""
    return -(-number // by)


def power_of_2(least: int) -> int:
    """The smallest one from `least` on: as `triton.next_power_of_2`, likewise."""
    return 1 << max(0, least - 1).bit_length()


def shared_memory(tensor: Tensor) -> int:
    """Bytes that a program may have on the tensor's GPU; a Hopper's where there is none, which interprets."""
    return properties(tensor.device).shared_memory_per_block_optin if tensor.is_cuda else HOPPER


@cache
def properties(device: torch.device):
    """What torch says of a GPU, asked once: its answer takes the host as long as a launch."""
    return torch.cuda.get_device_properties(device)
