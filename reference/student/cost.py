"""What converting a teacher would change, by its configuration alone: parameters, cache, FLOPs. No weights.

Letters: L tokens, D width, H heads, G groups, N = P head dim, K taps, W tokens of a window of vision, V of
the text window. Per layer:

    cache     attention  2·G·N·L in the weights' dtype     M-MATE  H·N·P + (K-1)·(2·G + H)·N, float32,
                                                                   and 2·G·N·(V-1) in the weights' dtype
    FLOPs per token, besides a multiplication and an addition for every weight of the decoder and its head:
              attention  2·H·N·L, half of the square, as it is causal
              M-MATE     10·H·N·P, a scan each way; 4·H·N·W; 2·K·(2·G + H)·N

M-MATE's line is for vision tokens; text has one scan, and V in the place of W.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import LinMUConfig
from .model import LinMUModel, decoder_layers, mixer_config, mixers, saved_options

LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
STATE_BYTES = 4  # float32


def describe(teacher: PreTrainedModel, student: LinMUModel) -> str:
    """Return a page about a teacher and the student that convert() made of it; the meta device will do."""
    attention = [layer.self_attn for layer in decoder_layers(teacher)]
    converted = mixers(student)
    sizes = mixer_config(teacher.config, attention[0], saved_options(student.config.linmu))
    before, after = count(teacher), count(student)
    lines = [
        f"{type(teacher).__name__} -> {type(student).__name__}",
        f"{len(converted)} of {len(attention)} decoder layers hold M-MATE: width {sizes.width}, "
        f"{sizes.heads} heads, {sizes.groups} groups, head dim {sizes.head_dim}, window {sizes.window_thw}, "
        f"text window {sizes.text_window}",
        "",
        f"parameters: {before:,} before, {after:,} after, {after - before:,} added "
        f"({(after - before) / before:.1%}); {per_layer(converted):,} in each M-MATE, "
        f"{count(attention[0]):,} in the attention that it replaces",
        "",
        f"{'':>10}{'cache of one sequence, MiB':>30}{'GFLOPs per token':>26}",
        f"{'tokens':>10}{'teacher':>18}{'student':>12}{'teacher':>14}{'student':>12}",
    ]
    for length in LENGTHS:
        caches = [
            cache_bytes(sizes, length, len(attention), kept, teacher.dtype) for kept in (0, len(converted))
        ]
        operations = [
            flops(model, sizes, length, kept) for model, kept in ((teacher, 0), (student, len(converted)))
        ]
        lines.append(
            f"{length:>10,}{caches[0] / 2**20:>18,.1f}{caches[1] / 2**20:>12,.1f}"
            f"{operations[0] / 1e9:>14,.3f}{operations[1] / 1e9:>12,.3f}"
        )
    return "\n".join(lines)


def count(module: nn.Module) -> int:
    """The number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def per_layer(converted: dict[int, nn.Module]) -> int:
    """The number of parameters of one M-MATE; 0 if there is none."""
    return next((count(mixer) for mixer in converted.values()), 0)


def cache_bytes(sizes: LinMUConfig, length: int, layers: int, converted: int, dtype: torch.dtype) -> int:
    """Bytes that decoding keeps of one sequence: keys and values, or states."""
    keys_values = 2 * sizes.groups * sizes.head_dim * length * dtype.itemsize
    taps = max(0, sizes.conv_kernel - 1)
    state = (sizes.heads * sizes.head_dim**2 + taps * sizes.conv_channels) * STATE_BYTES
    near = 2 * sizes.groups * sizes.head_dim * max(0, sizes.text_window - 1) * dtype.itemsize
    return (layers - converted) * keys_values + converted * (state + near)


def flops(model: PreTrainedModel, sizes: LinMUConfig, length: int, converted: int) -> int:
    """Floating-point operations per token of reading a prompt of `length` vision tokens, by the decoder."""
    layers = decoder_layers(model)
    weights = sum(active_weights(layer) for layer in layers) + model.get_output_embeddings().weight.numel()
    attention = 2 * sizes.heads * sizes.head_dim * length
    scans = (10 if sizes.reverse_scan else 5) * sizes.heads * sizes.head_dim**2
    window = 4 * sizes.heads * sizes.head_dim * min(length, math.prod(sizes.window_thw))
    taps = 2 * sizes.conv_kernel * sizes.conv_channels
    mixing = (len(layers) - converted) * attention + converted * (scans + window + taps)
    return 2 * weights + mixing


def active_weights(layer: nn.Module) -> int:
    """The weights of a decoder layer that a token meets: all, but of experts only those it is sent to."""
    total = count(layer)
    experts = getattr(layer.mlp, "experts", None)
    if experts is None:
        return total
    router = layer.mlp.gate
    return total - count(experts) + count(experts) * router.top_k // router.num_experts
