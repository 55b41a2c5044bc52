"""The registered operators of one token of text, `linmu::text_projection` and `linmu::text_step`.

They have no gradient: `FlexMA` takes them where none is asked for. As in `operators`, each runs on the engine
of its tensors and is opaque to torch.compile. The step overwrites the scan's state and says so.
"""

from __future__ import annotations

from torch import Tensor

from ..engine import choose_engine
from ..engine.operator import operator
from ..precision import accumulation_dtype
from ..scan.operator import kernels
from . import torch_engine as torch_step


@operator("text_projection")
def text_projection(
    u: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    dt_weight: Tensor,
    dt_bias: Tensor,
    z_weight: Tensor | None,
    z_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`text_step.project`."""
    engine = choose_engine("text_projection", u)
    module = torch_step if engine == "torch" else kernels("decoding.kernels.text_step")
    return module.project(u, weights, biases, dt_weight, dt_bias, z_weight, z_bias)


@text_projection.register_fake
def _(u, weights, biases, dt_weight, dt_bias, z_weight, z_bias):
    taken = u.new_empty(u.shape[0], sum(weight.shape[0] for weight in weights))
    rate = u.new_empty(u.shape[0], dt_weight.shape[0], dtype=accumulation_dtype(u.dtype))
    return taken, rate, u.new_empty(0 if z_weight is None else (u.shape[0], z_weight.shape[0]))


@operator("text_step", mutates_args={"scan_state"})
def text_step(
    scan_state: Tensor,
    conv_state: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    rate: Tensor,
    A_log: Tensor,
    D: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    z: Tensor | None,
    valid: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`text_step.advance`: the heads and the convolution's new state; the scan's is written in its place."""
    engine = choose_engine("text_step", x, x.shape[-1])
    module = torch_step if engine == "torch" else kernels("decoding.kernels.text_step")
    weights = (A_log, D, conv_weight, conv_bias, norm_weight)
    return module.advance(scan_state, conv_state, x, B, C, rate, *weights, z, valid, scale, eps)


@text_step.register_fake
def _(scan_state, conv_state, x, B, C, rate, A_log, D, conv_weight, conv_bias, norm_weight, z, valid, *_):
    batch, heads, _, head_dim = scan_state.shape
    channels = x.shape[1] * x.shape[2] + B.shape[1] * B.shape[2] + C.shape[1] * C.shape[2]
    before = 0 if conv_weight is None else conv_weight.shape[1] - 1
    dtype = x.dtype if conv_weight is None else scan_state.dtype
    return x.new_empty(batch, heads * head_dim), x.new_empty(batch, before, channels, dtype=dtype)
