# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for what stands between a layer's products: sums, norms, the gate of the MLP; and gradients.

Every step is rounded where `torch_engine` rounds it, so that results differ by the order of one sum at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import ceil_div, contiguous, power_of_2
from .operator import (
    AddNormInputs,
    AddNormOutputs,
    GateGrads,
    GateInputs,
    GateOutputs,
    NormGrads,
    NormInputs,
    NormOutputs,
    add_norm_outputs,
)

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


def norm(inputs: NormInputs) -> Tensor:
    """The operator on a Triton kernel."""
    return add_norm(AddNormInputs(inputs.x, None, inputs.weight, inputs.eps)).normed


@triton.jit
def norm_backward_kernel(GRAD, X, WEIGHT, X_GRAD, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row."""
    row = tl.cast(tl.program_id(0), tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    real = column < WIDTH
    x = tl.load(X + row + column, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + column, mask=real, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + row + column, mask=real, other=0.0).to(tl.float32) * weight
    grad = grad.to(X_GRAD.dtype.element_ty).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    along = scale * scale * (tl.sum(grad * x, 0) / WIDTH)
    out = scale * (grad - x * along)
    tl.store(X_GRAD + row + column, out.to(X_GRAD.dtype.element_ty), mask=real)


def norm_backward(inputs: NormInputs, outputs: NormOutputs, grads: NormOutputs) -> NormGrads:
    """Its gradient on a Triton kernel."""
    x, grad = inputs.x.contiguous(), grads.y.contiguous()
    x_grad, width = torch.empty_like(x), x.shape[-1]
    block = power_of_2(width)
    norm_backward_kernel[(x.numel() // width,)](
        grad,
        x,
        inputs.weight,
        x_grad,
        inputs.eps,
        WIDTH=width,
        BLOCK=block,
        num_warps=min(8, max(1, block // 256)),
    )
    return NormGrads(x_grad)


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


@triton.jit
def gate_backward_kernel(GRAD, X, UP, X_GRAD, UP_GRAD, numbers, BLOCK: tl.constexpr):
    """Some numbers in a row."""
    place = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < numbers
    grad = tl.load(GRAD + place, mask=real, other=0.0)
    wide = tl.load(X + place, mask=real, other=0.0).to(tl.float32)
    up = tl.load(UP + place, mask=real, other=0.0).to(tl.float32)
    opening = 1.0 / (1.0 + tl.exp(-wide))
    opened = (wide / (1.0 + tl.exp(-wide))).to(grad.dtype).to(tl.float32)
    inner = (grad.to(tl.float32) * up).to(grad.dtype).to(tl.float32)
    gate_grad = inner * (opening * (1.0 + wide * (1.0 - opening)))
    tl.store(X_GRAD + place, gate_grad.to(grad.dtype), mask=real)
    tl.store(UP_GRAD + place, (grad.to(tl.float32) * opened).to(grad.dtype), mask=real)


def gate_product_backward(inputs: GateInputs, outputs: GateOutputs, grads: GateOutputs) -> GateGrads:
    """Its gradient on a Triton kernel."""
    grad, gate, up = (tensor.contiguous() for tensor in (grads.y, inputs.gate, inputs.up))
    found = GateGrads(torch.empty_like(gate), torch.empty_like(up))
    gate_backward_kernel[(ceil_div(gate.numel(), BLOCK),)](
        grad, gate, up, *found, gate.numel(), BLOCK=BLOCK, num_warps=4
    )
    return found
