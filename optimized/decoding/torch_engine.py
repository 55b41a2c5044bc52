"""One token of decoding: the torch engine of its operators, and the gradient of `scan_step`.

Letters: B batch, D width, H query heads, G groups, N state size, P head dim, K conv taps; ȳ is the gradient
of y, and so on.

    S' = e^{dt A} S + dt B ⊗ x        y = S'ᵀ C + D x                                                    (1)
    Ḡ = S̄' + C ⊗ ȳ        S̄ = e^{dt A} Ḡ        C̄ = S' ȳ        B̄ = dt Ḡ x     x̄ = dt Ḡᵀ B + D ȳ      (2)

`text_step` is eqs. (1) to (5) of `reference/flex_ma.py` for L = 1, without the matrix products and the q/k
norms and rope that follow them. `project` is those products, in the order of the convolution's channels;
`output` is eq. (5)'s, the local branch's, and the mix of `reference/m_mate.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.numerics import accumulation_dtype, rms_norm_per_head
from ..causal_conv import torch_engine as conv
from ..causal_conv.operator import ConvInputs
from ..elementwise.operator import MixInputs
from ..elementwise.torch_engine import mix
from .operator import (
    OutputInputs,
    PooledTextStepInputs,
    ProjectionInputs,
    ProjectionOutputs,
    StepGrads,
    StepInputs,
    StepOutputs,
    TextStepInputs,
    TextStepOutputs,
    projection_outputs,
)


def scan_step(inputs: StepInputs) -> StepOutputs:
    """Eq. (1)."""
    wide = prepare(inputs)
    new_state = following_state(wide)
    y = (wide.C[..., None, :] @ new_state).squeeze(-2)  # (B, H, P)
    if wide.D is not None:
        y = y + wide.D.to(y.dtype)[:, None] * wide.x
    return StepOutputs(y.to(inputs.x.dtype), new_state)


def scan_step_backward(inputs: StepInputs, outputs: StepOutputs, grads: StepOutputs) -> StepGrads:
    """Eq. (2): gradients in the accumulation dtype."""
    groups, valid, wide = inputs.x.shape[1], inputs.valid, prepare(inputs)
    state, x, dt, A, B, C, D = wide[:7]
    through = torch.zeros_like(state) if grads.state is None else grads.state.to(x.dtype)
    y_grad = torch.zeros_like(x) if grads.y is None else grads.y.to(x.dtype)
    if valid is not None:
        y_grad = torch.where(valid[:, None, None], y_grad, 0)
    decay = torch.exp(dt * A)
    through = torch.addcmul(through, C[..., None], y_grad[..., None, :])
    rate_grad = decay * (through * state).sum((-2, -1))  # of dt A, (B, H)
    written = (through @ x[..., None]).squeeze(-1)  # (B, H, N)
    x_grad = dt[..., None] * (B[..., None, :] @ through).squeeze(-2)
    if D is not None:
        x_grad = x_grad + D.to(x.dtype)[:, None] * y_grad
    dt_grad = (written * B).sum(-1) + rate_grad * A
    if valid is not None:
        dt_grad = torch.where(valid[:, None], dt_grad, 0)
    return StepGrads(
        state=decay[..., None, None] * through,
        x=x_grad.unflatten(1, (groups, -1)).sum(2),
        dt=dt_grad,
        A=(rate_grad * dt).sum(0),
        B=(dt[..., None] * written).unflatten(1, (groups, -1)).sum(2),
        C=(following_state(wide) @ y_grad[..., None]).squeeze(-1),
        D=None if D is None else (y_grad * x).sum((0, 2)),
    )


def prepare(inputs: StepInputs) -> StepInputs:
    """In the accumulation dtype, groups repeated, rows that are not valid at rest."""
    accumulate, heads, valid = accumulation_dtype(inputs.x.dtype), inputs.C.shape[1], inputs.valid
    state, x, dt, A, B, C = (tensor.to(accumulate) for tensor in inputs[:6])
    if valid is not None:
        x, B, C = (torch.where(valid[:, None, None], tensor, 0) for tensor in (x, B, C))
        dt = torch.where(valid[:, None], dt, 0)
    x, B = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (x, B))
    return inputs._replace(state=state, x=x, dt=dt, A=A, B=B, C=C)


def following_state(inputs: StepInputs) -> Tensor:
    """S' of eq. (1), (B, H, N, P)."""
    write = (inputs.dt[..., None] * inputs.B)[..., None] * inputs.x[..., None, :]
    return torch.addcmul(write, torch.exp(inputs.dt * inputs.A)[..., None, None], inputs.state)


def project(inputs: ProjectionInputs) -> ProjectionOutputs:
    """Every product with the hidden states of one token."""
    u, weights, biases, dt_weight, dt_bias, z_weight, z_bias, _ = inputs
    pairs = zip(weights, biases, strict=True)
    xBC = torch.cat([F.linear(u, weight, bias) for weight, bias in pairs], dim=1)
    wide = u.to(accumulation_dtype(u.dtype))
    rate = F.linear(wide, dt_weight.to(wide.dtype), dt_bias.to(wide.dtype))
    z = projection_outputs(inputs).z if z_weight is None else F.linear(u, z_weight, z_bias)
    return ProjectionOutputs(xBC, rate, z)


def output(inputs: OutputInputs) -> Tensor:
    """Both output projections, mixed."""
    flex, local, logit, row, weights, biases, _ = inputs
    flex, local = map(F.linear, (flex, local), weights, biases)
    return mix(MixInputs(flex[:, None], local, logit[:, None], row[:, None]))[:, 0]


def text_step(inputs: TextStepInputs) -> TextStepOutputs:
    """Scale of C, convolution, dt and A, one step of the scan, norm and output gate."""
    valid, wide, parts = inputs.valid, inputs.scan_state.dtype, (inputs.x, inputs.B, inputs.C * inputs.scale)
    xBC = torch.cat([part.flatten(1) for part in parts], dim=1)[:, None]
    if inputs.conv_weight is None:
        conv_state = xBC.new_zeros(len(xBC), 0, xBC.shape[2])
    else:
        mask = None if valid is None else valid[:, None]
        weights = (inputs.conv_weight, inputs.conv_bias, mask, inputs.conv_state)
        (xBC,), conv_state = conv.forward(ConvInputs([xBC], [1.0], *weights))
    split = xBC[:, 0].split([part[0].numel() for part in parts], dim=1)
    x, B, C = (part.view(like.shape) for part, like in zip(split, parts, strict=True))
    dt, A = F.softplus(inputs.rate.to(wide)), -torch.exp(inputs.A_log.to(wide))
    y, scan_state = scan_step(StepInputs(inputs.scan_state, x, dt, A, B, C, inputs.D, valid))
    inputs.scan_state.copy_(scan_state)
    if inputs.norm_weight is not None:
        y = rms_norm_per_head(y[:, None], inputs.norm_weight, inputs.eps)[:, 0]
    y = y.to(inputs.x.dtype).flatten(1)
    return TextStepOutputs(y if inputs.z is None else y * F.silu(inputs.z), conv_state)


def pooled_text_step(inputs: PooledTextStepInputs) -> Tensor:
    """`text_step` on copies of the rows, which are put back."""
    scan_pool, conv_pool, rows, turn, *rest, logit, out = inputs
    scan_state = scan_pool[rows].to(accumulation_dtype(inputs.x.dtype))
    conv_state = None
    if inputs.conv_weight is not None:
        taps = inputs.conv_weight.shape[1]
        conv_state = scan_state.new_zeros(len(rows), 0, len(inputs.conv_weight))
        if conv_pool is not None:
            conv_state = conv_pool[rows[:, None], ring_slots(turn, taps)]
    y, after = text_step(TextStepInputs(scan_state, conv_state, *rest))
    scan_pool[rows] = scan_state.to(scan_pool.dtype)
    if conv_pool is not None:
        slot, newest = turn % taps, after[:, -1]
        if inputs.valid is not None:
            newest = torch.where(inputs.valid[:, None], newest, conv_pool[rows, slot])
        conv_pool[rows, slot] = newest
    if logit is not None:  # a row at rest may have any
        y = torch.where(y == 0, y, y * torch.sigmoid(logit)).to(y.dtype)
    return y if out is None else out.copy_(y).new_empty(0)


def ring_slots(turn: Tensor, slots: int) -> Tensor:
    """(B,) int64 tokens so far -> (B, slots - 1): where the last of them stand in a ring, in their order."""
    return (turn[:, None] + torch.arange(1, slots, device=turn.device)) % slots
