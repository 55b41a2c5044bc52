"""What every function that launches Triton kernels needs: sizes, masks, strides, and what the GPU is."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

HOPPER = 227 * 1024


def ceil_div(number: int, by: int) -> int:
    """As `triton.cdiv`, which takes the host ten times as long."""
    return -(-number // by)


def power_of_2(least: int) -> int:
    """The smallest one from `least` on: as `triton.next_power_of_2`, likewise."""
    return 1 << max(0, least - 1).bit_length()


def tile_size(size: int) -> int:
    """The power of two, at least 16, that holds `size`: what a matrix product of tiles takes."""
    return max(16, power_of_2(size))


def rows_of(tensor: Tensor) -> Tensor:
    """`tensor` with adjacent elements in its last axis; the other strides are free."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """`tensor.contiguous()`, if there is one."""
    return None if tensor is None else tensor.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def stride_arguments(**tensors: Tensor) -> dict[str, int]:
    """The strides of (B, L, heads, ·) tensors, as `x_batch`, `x_token`, `x_head` for x."""
    axes = ("batch", "token", "head")
    return {
        f"{name}_{axis}": tensor.stride(i) for name, tensor in tensors.items() for i, axis in enumerate(axes)
    }


def shared_memory(tensor: Tensor) -> int:
    """Bytes that a program may have on the tensor's GPU; a Hopper's where there is none, which interprets."""
    return properties(tensor.device).shared_memory_per_block_optin if tensor.is_cuda else HOPPER


@cache
def properties(device: torch.device):
    """What torch says of a GPU, asked once: its answer takes the host as long as a launch."""
    return torch.cuda.get_device_properties(device)
