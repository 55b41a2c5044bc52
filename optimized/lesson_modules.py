"""What a lesson puts over a decoder's modules while it lasts: Hugging Face's results in fewer kernels.

    norms       RMS norms with a frozen weight, forward and backward one kernel each
    MLPs        gate and up of one input, adapters of low rank as part of the products, the gate in one kernel
    attention   the teacher's: RoPE in one kernel, and padding or packed rows seen by the kernel of sliding
                windows, a window as long as the row, in the place of a mask (B, L, L) made in every layer
    branches    of M-MATE: q, k and v of one input

Only modules of known classes, whose forward is their own, get another one; each call asks whether what it is
given is what it knows, and is Hugging Face's own forward otherwise. Norms and gates round where theirs do;
RoPE and adapters round once where theirs do at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ..reference.student.unconverted_attention import causal_attention
from ..reference.training.teacher_student import TeacherStudentMixer
from .elementwise.operator import GateInputs, NormInputs, frozen_norm, gate_product
from .elementwise.shared_products import Part, shared_products
from .engine import engine_of_block
from .engine.torch_state import has_no_hooks, is_observed
from .flex_ma import FlexMA
from .graphs.layers import MLPS, NORMS, is_own, kinds
from .local_swin import LocalSwin
from .projections import are_plain, is_readable, rotated
from .sliding_window_attention import spans_of_layer
from .sliding_window_attention.operator import SlidingInputs, attend

ATTENTIONS = kinds("Attention")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def replace_methods(decoder: nn.Module) -> list[tuple[nn.Module, str]]:
    """Put these methods over those of the decoder's modules. Returns what `restore_methods` takes."""
    replaced = []
    for module, name, method in replacements(decoder):
        if name not in vars(module):  # another lesson's are in place
            vars(module)[name] = partial(method, module)
            replaced.append((module, name))
    return replaced


def restore_methods(replaced: list[tuple[nn.Module, str]]) -> None:
    """Undo `replace_methods`."""
    for module, name in replaced:
        vars(module).pop(name, None)
    replaced.clear()


def replacements(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, Callable]]:
    """The modules that have a faster method, its name, and that."""
    for module in decoder.modules():
        if is_own(module, NORMS):
            yield module, "forward", normed
        elif is_own(module, MLPS) and is_own(module.act_fn, {SiLUActivation, nn.SiLU}):
            yield module, "forward", through_mlp
        elif isinstance(module, FlexMA | LocalSwin):
            yield module, "project_heads", project_heads
        elif isinstance(module, TeacherStudentMixer) and is_own(module.attention, ATTENTIONS):
            yield module.attention, "forward", attended


def normed(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """An RMS norm."""
    weight, eps = norm.weight, norm.variance_epsilon
    trained = weight.requires_grad and torch.is_grad_enabled()
    if trained or not is_readable(weight, (hidden_states.dtype,)) or hidden_states.dtype not in FLOATS:
        return type(norm).forward(norm, hidden_states)
    return frozen_norm(NormInputs(hidden_states, weight, eps))


def through_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """An MLP with a gate."""
    gate, up = products(x, [mlp.gate_proj, mlp.up_proj])
    if gate.dtype != up.dtype or is_observed():
        return mlp.down_proj(mlp.act_fn(gate) * up)
    (y,) = products(gate_product(GateInputs(gate, up)), [mlp.down_proj])
    return y


def products(x: Tensor, linears: list[nn.Module]) -> tuple[Tensor, ...]:
    """The output of each module, in one operator if all are plain, or so but for an adapter of low rank."""
    dtype, parts = dtype_of_products(x), [part_of(linear) for linear in linears]
    if dtype not in FLOATS or None in parts or is_observed():
        return tuple(linear(x) for linear in linears)
    if not torch.is_autocast_enabled(x.device.type) and any(
        tensor.dtype != dtype for part in parts for tensor in part[:4] if tensor is not None
    ):
        return tuple(linear(x) for linear in linears)
    return shared_products(x.to(dtype), parts)


def project_heads(branch: FlexMA | LocalSwin, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`HeadProjections.project_heads`."""
    q, k, v = (
        y.unflatten(-1, (-1, branch.config.head_dim))
        for y in products(u, [branch.q_proj, branch.k_proj, branch.v_proj])
    )
    return (branch.q_norm(q), branch.k_norm(k), v) if branch.config.qk_norm else (q, k, v)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: as autocast says, if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def part_of(linear: nn.Module) -> Part | None:
    """The weights of a linear module, and of the adapter of low rank that is on; None if there is more to
    it: several adapters, a dropout, a variant of LoRA, hooks, weights that only the module can read."""
    if are_plain([linear]):
        return Part(linear.weight, linear.bias)
    from peft.tuners.lora.layer import Linear as AdaptedLinear

    if type(linear) is not AdaptedLinear or not has_no_hooks(linear) or not are_plain([linear.base_layer]):
        return None
    part = Part(linear.base_layer.weight, linear.base_layer.bias)
    if linear.disable_adapters or linear.merged:
        return None if linear.disable_adapters and linear.merged else part
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    if len(names) != 1 or names[0] in linear.lora_variant:
        return part if not names else None
    (name,) = names
    pair, dropout = [linear.lora_A[name], linear.lora_B[name]], linear.lora_dropout[name]
    if not (are_plain(pair) and is_own(dropout, {nn.Identity})) or any(
        each.bias is not None for each in pair
    ):
        return None
    return part._replace(down=pair[0].weight, up=pair[1].weight, scale=float(linear.scaling[name]))


def attended(
    attention: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    linmu_sequence: Tensor | None = None,
    linmu_split: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The teacher's causal attention of whole rows, under a padding mask (B, L), in each sample of packed
    rows; Hugging Face's own where rows are split over processes. What it says of padding is 0, where Hugging
    Face's is anything finite."""
    engine = engine_of_block("attention", hidden_states, attention.head_dim)
    drops = attention.training and attention.attention_dropout
    cached = any(others.get(name) is not None for name in ("cache", "past_key_values"))
    windowed = getattr(attention, "sliding_window", None) is not None
    together = position_embeddings is not None and position_embeddings[0].ndim == 3  # M-RoPE's too
    if engine != "triton" or drops or cached or windowed or not together or linmu_split is not None:
        given = {"attention_mask": attention_mask, "linmu_sequence": linmu_sequence, **others}
        given |= {} if linmu_split is None else {"linmu_split": linmu_split}
        return type(attention).forward(
            attention, hidden_states, position_embeddings=position_embeddings, **given
        )
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    q, k, v = (y.unflatten(-1, (-1, attention.head_dim)) for y in products(hidden_states, linears))
    q, k = (rotated(each, position_embeddings, engine=engine) for each in (q, k))
    length = q.shape[1]
    if attention_mask is None and linmu_sequence is None:
        by_head = (tensor.transpose(1, 2) for tensor in (q, k, v))
        o, _ = causal_attention(attention, *by_head, None, scaling=attention.scaling)
        return attention.o_proj(o.flatten(2)), None
    valid = None if attention_mask is None else attention_mask.bool()
    spans = spans_of_layer(length, length, None, valid, linmu_sequence, None)
    o, _ = attend(SlidingInputs(q, k, v, *spans[:4], length, float(attention.scaling), engine))
    return attention.o_proj(o.flatten(2)), None
