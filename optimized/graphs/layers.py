"""A decoder's layers, with what stands between their products in as few kernels as it takes.

Hugging Face computes a norm in eight operations, a residual sum in one more, the MLP's gate in two. Where
modules are what Hugging Face made, `add_norm` and `gate_product` compute the same, each step rounded
likewise; where one was replaced or its forward is another's (torch.compile's, for instance), it is called.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl

from ..elementwise.operator import AddNormInputs, GateInputs, add_norm, gate_product
from ..engine.torch_state import has_no_hooks

MODELINGS = (modeling_llama, modeling_qwen2, modeling_qwen2_vl, modeling_qwen2_5_vl)


def kinds(ending: str) -> frozenset[type[nn.Module]]:
    """The classes of the families' files whose names end so."""
    return frozenset(kind for file in MODELINGS for name, kind in vars(file).items() if name.endswith(ending))


LAYERS, NORMS, MLPS = kinds("DecoderLayer"), kinds("RMSNorm"), kinds("MLP")


def through_layers(decoder: nn.Module, hidden: Tensor, **options: Any) -> Tensor:
    """The decoder's layers and its last norm, over (B, L, D)."""
    more = None  # what the layer before adds
    for layer in decoder.layers:
        if is_own(layer, LAYERS):
            hidden, normed = added_and_normed(layer.input_layernorm, hidden, more)
            more, _ = layer.self_attn(hidden_states=normed, **options)
            hidden, normed = added_and_normed(layer.post_attention_layernorm, hidden, more)
            more = through_mlp(layer.mlp, normed)
        else:
            hidden = layer(hidden if more is None else hidden + more, **options)
            hidden, more = hidden[0] if isinstance(hidden, tuple) else hidden, None
    return added_and_normed(decoder.norm, hidden, more)[1]


def added_and_normed(norm: nn.Module, hidden: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden + more, and its norm."""
    if is_own(norm, NORMS) and norm.weight.dtype == hidden.dtype:
        total, normed = add_norm(AddNormInputs(hidden, more, norm.weight, norm.variance_epsilon))
        return hidden if more is None else total, normed
    total = hidden if more is None else hidden + more
    return total, norm(total)


def through_mlp(mlp: nn.Module, hidden: Tensor) -> Tensor:
    """The MLP."""
    if is_own(mlp, MLPS) and is_own(mlp.act_fn, {SiLUActivation, nn.SiLU}):
        return mlp.down_proj(gate_product(GateInputs(mlp.gate_proj(hidden), mlp.up_proj(hidden))))
    return mlp(hidden)


def is_own(module: nn.Module, known: frozenset[type[nn.Module]] | set[type[nn.Module]]) -> bool:
    """Whether it is one of these, and calling it is its class's forward and nothing else."""
    return type(module) in known and has_no_hooks(module)
