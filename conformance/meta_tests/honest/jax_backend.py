"""The operators in JAX behind `torch.autograd.Function`: an optional extra, `pip install linmu[jax]`.

JAX computes in float32, or float64 for float64 tensors, and gives back torch tensors in the dtypes asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from linmu.reference.causal_conv import check_conv
from linmu.reference.numerics import accumulation_dtype
from linmu.reference.window_attention import check_window_attention

from .common import make_operators, of_packed_rows

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")


def to_jax(tensor: Tensor) -> jax.Array:
    return jnp.asarray(tensor.detach().cpu().contiguous().numpy())


def to_torch(array: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(array)).to(dtype)


class ThroughJax(torch.autograd.Function):
    """Outputs of `function(*arrays)` and its vector-Jacobian product, jitted for every shape."""

    @staticmethod
    def forward(ctx, function: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = [to_jax(tensor) for tensor in tensors]
        ctx.function, ctx.arrays = function, arrays
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return tuple(to_torch(output, tensors[0].dtype) for output in jitted(function)(*arrays))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *asked: Tensor):
        cotangents = tuple(to_jax(part) for part in asked)
        gradients = jitted_gradient(ctx.function)(ctx.arrays, cotangents)
        floats = [dtype.is_floating_point for dtype in ctx.dtypes]
        pairs = zip(gradients, ctx.dtypes, floats, strict=True)
        return None, *(to_torch(found, dtype) if is_float else None for found, dtype, is_float in pairs)


JITTED: dict[Any, Callable] = {}


def jitted(function: Callable) -> Callable:
    return JITTED.setdefault(function, jax.jit(function))


def jitted_gradient(function: Callable) -> Callable:
    def pull(arrays, cotangents):
        return jax.vjp(function, *arrays)[1](cotangents)

    return JITTED.setdefault((function, "gradient"), jax.jit(pull))


def scan_in_jax(x, dt, A, B, C, state):
    """`jax.lax.associative_scan` over pairs (decay, state)."""
    decays = jnp.exp(dt * A)[..., None, None]
    writes = (dt[..., None] * B)[..., None] * x[..., None, :]
    writes = writes.at[:, 0].add(decays[:, 0] * state)

    def join(earlier, later):
        return earlier[0] * later[0], earlier[1] * later[0] + later[1]

    _, states = jax.lax.associative_scan(join, (decays, writes), axis=1)
    return jnp.einsum("blhn,blhnp->blhp", C, states), states[:, -1]


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All in the accumulation dtype."""
    return ThroughJax.apply(scan_in_jax, x, dt, A, B, C, state)


selective_scan, bidirectional_scan, scan_step = make_operators(scan)


def attention_in_jax(q, k, v, mates):
    """q (B, L, H, N) scaled, k and v per head, mates (B, 1, L, L) as numbers."""
    scores = jnp.where(mates > 0, jnp.einsum("bihn,bjhn->bhij", q, k), jnp.finfo(q.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1) * mates
    return (jnp.einsum("bhij,bjhp->bihp", weights, v),)


def window_attention(q, k, v, window_id, *, scale=None):
    check_window_attention("window_attention", q, k, v, window_id)
    wide, ratio, dtype = accumulation_dtype(q.dtype), q.shape[2] // k.shape[2], q.dtype
    inside = window_id >= 0
    mates = ((window_id[:, :, None] == window_id[:, None, :]) & inside[:, :, None])[:, None].to(wide)
    q, k, v = (torch.where(inside[..., None, None], tensor.to(wide), 0.0) for tensor in (q, k, v))
    k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    return ThroughJax.apply(attention_in_jax, q, k, v, mates)[0].to(dtype)


def causal_conv_in_jax(u, weight, bias, places, mask):
    """u (B, K-1+L, channels) behind the state, places (B, L, K) of the inputs of each token's taps."""
    seen = jnp.take_along_axis(u[:, None], places[..., None], axis=2)  # (B, L, K, channels)
    return (((seen * weight.T).sum(2) + bias) * mask[..., None],)


@of_packed_rows("mask")
def causal_conv(u, weight, bias=None, *, mask=None, initial_state=None):
    check_conv("causal_conv", u, weight, bias, mask, initial_state)
    wide, dtype, (batch, length, channels) = accumulation_dtype(u.dtype), u.dtype, u.shape
    taps = weight.shape[1]
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    u = torch.where(mask[..., None], u.to(wide), 0.0)
    start = u.new_zeros(batch, taps - 1, channels) if initial_state is None else initial_state.to(wide)
    bias = u.new_zeros(channels) if bias is None else bias.to(wide)
    behind = torch.cat([start, u], dim=1)
    kept = torch.cat([torch.ones(batch, taps - 1, dtype=torch.bool), mask], dim=1)
    order = torch.argsort(~kept, dim=1, stable=True)  # what takes part first, each in its order
    behind = behind.gather(1, order[..., None].expand_as(behind))
    ends = mask.cumsum(1) + taps - 2  # the place of each token among what takes part
    places = (ends[..., None] + torch.arange(1 - taps, 1)).clamp_min(0)
    out = ThroughJax.apply(causal_conv_in_jax, behind, weight.to(wide), bias, places, mask.to(wide))[0]
    last = mask.sum(1)[:, None] + torch.arange(taps - 1)
    return out.to(dtype), behind.gather(1, last[..., None].expand(-1, -1, channels))
