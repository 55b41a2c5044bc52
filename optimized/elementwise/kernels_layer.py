# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for what stands between a layer's products: sums, norms, and the gate of the MLP.

Every step is rounded where `torch_engine` rounds it, so that results differ by the order of one sum at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import ceil_div, contiguous, power_of_2
from .operator import AddNormInputs, AddNormOutputs, GateInputs, add_norm_outputs

BLOCK = 1024  # numbers that a program of the gate takes


@triton.jit
def add_norm_kernel(
    X, MORE, WEIGHT, TOTAL, NORMED, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_MORE: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.cast(tl.program_id(0), tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    real = column < WIDTH
    x = tl.load(X + row + column, mask=real, other=0.0)
    if HAS_MORE:
        more = tl.load(MORE + row + column, mask=real, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(TOTAL + row + column, x, mask=real)
    wide = x.to(tl.float32)
    wide = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps))
    weight = tl.load(WEIGHT + column, mask=real, other=0.0).to(tl.float32)
    normed = weight * wide.to(x.dtype).to(tl.float32)
    tl.store(NORMED + row + column, normed.to(x.dtype), mask=real)


def add_norm(inputs: AddNormInputs) -> AddNormOutputs:
    """The operator on a Triton kernel."""
    x, more = inputs.x.contiguous(), contiguous(inputs.more)
    outputs, width = add_norm_outputs(inputs), x.shape[-1]
    block = power_of_2(width)
    add_norm_kernel[(x.numel() // width,)](
        x,
        more,
        inputs.weight,
        *outputs,
        inputs.eps,
        WIDTH=width,
        BLOCK=block,
        HAS_MORE=more is not None,
        num_warps=min(8, max(1, block // 256)),
    )
    return outputs


@triton.jit
def gate_kernel(X, UP, OUT, numbers, BLOCK: tl.constexpr):
    """Some numbers in a row."""
    place = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < numbers
    gate = tl.load(X + place, mask=real, other=0.0)
    up = tl.load(UP + place, mask=real, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(OUT + place, (opened * up).to(gate.dtype), mask=real)


def gate_product(inputs: GateInputs) -> Tensor:
    """The operator on a Triton kernel."""
    gate, up = inputs.gate.contiguous(), inputs.up.contiguous()
    out = torch.empty_like(gate)
    gate_kernel[(ceil_div(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=4)
    return out
