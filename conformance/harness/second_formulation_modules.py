"""Second formulations of the modules, as functions of their parameters, on top of those of the operators.

Letters: B batch, L tokens, D width, H heads, G groups, N = P head dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from linmu.reference import LinMUConfig

from . import second_formulation
from .second_sliding_window import pairs_and_rest

Parameters = Mapping[str, Tensor]
Angles = tuple[Tensor, Tensor]


def flex_ma(
    p: Parameters, u: Tensor, coords: Tensor, valid: Tensor, angles: Angles, config, layer_index
) -> Tensor:
    """Project, convolve and scan in scan order, undo the order, norm per head, gate, project out."""
    q, k, v = projected(p, u, config)
    if config.scan_rope:
        q, k = rotated(q, angles), rotated(k, angles)
    order = second_formulation.scan_order(coords, layer_index if config.rotary_major else 0)
    rows = torch.arange(len(u))[:, None]
    channels = torch.cat([v.flatten(2), k.flatten(2), q.flatten(2) / config.head_dim**0.5], dim=-1)[
        rows, order
    ]
    if config.conv_kernel:
        channels, _ = second_formulation.causal_conv(channels, p["conv_weight"], p["conv_bias"], mask=valid)
    grouped = config.groups * config.head_dim
    x, B, C = (
        split(channels[..., a:b], config)
        for a, b in ((0, grouped), (grouped, 2 * grouped), (2 * grouped, None))
    )
    segment = coords[..., 0] if config.reverse_scan else None
    scanned, _ = second_formulation.bidirectional_scan(
        x,
        F.softplus(linear(p, "dt_proj", u))[rows, order],
        -p["A_log"].exp(),
        B,
        C,
        gate=linear(p, "scan_gate_proj", u).sigmoid()[rows, order],
        segment=segment,
        valid=valid,
        D=p["D"],
    )
    y = torch.zeros_like(scanned).index_put((rows, order), scanned)
    if config.head_norm:
        y = normed(y, p["norm_weight"].view(config.heads, config.head_dim), config.norm_eps)
    y = y.flatten(2)
    if config.output_gate:
        z = linear(p, "z_proj", u)
        y = y * z * z.sigmoid()
    return linear(p, "o_proj", y)


def local_swin(
    p: Parameters, u: Tensor, coords: Tensor, valid: Tensor, angles: Angles, config: LinMUConfig, layer_index
) -> Tensor:
    """The teacher's attention over the whole row, under a mask of window mates and of a text window."""
    q, k, v = projected(p, u, config)
    q, k = rotated(q, angles), rotated(k, angles)
    k, v = second_formulation.heads_of(k, config.heads), second_formulation.heads_of(v, config.heads)
    mates = second_formulation.same_window(coords, config.window_thw, layer_index % 2 == 1)
    vision, part = coords[..., 0] >= 0, coords[..., 0] >= 0
    if config.text_window:
        before, _ = pairs_and_rest(config.text_window, u.shape[1], len(u), ~vision, valid)
        mates, part = mates | before, valid
    allowed = mates | torch.eye(u.shape[1], dtype=torch.bool)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None]).transpose(1, 2)
    return linear(p, "o_proj", attended.flatten(2)) * part[..., None]


def m_mate(
    p: Parameters, u: Tensor, coords: Tensor, valid: Tensor, angles: Angles, config, layer_index
) -> Tensor:
    """An interpolation; without a text window, Flex-MA alone on text."""
    flex = flex_ma(below(p, "flex_ma."), u, coords, valid, angles, config, layer_index)
    local = local_swin(below(p, "local_swin."), u, coords, valid, angles, config, layer_index)
    mix = linear(p, "mix_proj", u).sigmoid()
    mixes = (valid if config.text_window else coords[..., 0] >= 0)[..., None].to(u)
    return flex + mixes * (1 - mix) * (local - flex)


def below(p: Parameters, prefix: str) -> dict[str, Tensor]:
    """Parameters of a submodule."""
    return {name.removeprefix(prefix): tensor for name, tensor in p.items() if name.startswith(prefix)}


def linear(p: Parameters, name: str, u: Tensor) -> Tensor:
    """u Wᵀ + b, the bias where there is one."""
    y = torch.einsum("bld,ed->ble", u, p[f"{name}.weight"])
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def split(tensor: Tensor, config: LinMUConfig) -> Tensor:
    """(B, L, heads·N) -> (B, L, heads, N)."""
    return tensor.reshape(*tensor.shape[:2], -1, config.head_dim)


def projected(p: Parameters, u: Tensor, config: LinMUConfig) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v per head, normed where the teacher norms them."""
    q, k, v = (split(linear(p, name, u), config) for name in ("q_proj", "k_proj", "v_proj"))
    if config.qk_norm:
        q = normed(q, p["q_norm.weight"], config.norm_eps)
        k = normed(k, p["k_norm.weight"], config.norm_eps)
    return q, k, v


def normed(tensor: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of the last axis."""
    return weight * tensor / (tensor.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(tensor: Tensor, angles: Angles) -> Tensor:
    """Multiply halves, taken for real and imaginary parts, by cos + i sin."""
    cos, sin = (angle[:, :, None, : tensor.shape[-1] // 2] for angle in angles)
    real, imaginary = tensor.tensor_split(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
