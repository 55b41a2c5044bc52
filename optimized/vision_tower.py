"""The vision towers of Qwen2-VL, 2.5-VL and 3-VL in fewer and larger launches, for the same results.

Letters: S patches of all pictures of a call, H heads, N head dim, F width of the MLP.

Hugging Face's towers attend to one window or frame after the other, which for a video are thousands of calls.
Here all that are equally long are one call. On a GPU a Qwen2.5-VL tower also gets norms and RoPE from the
decoder's kernels, and its MLP, 3,420 wide, products whose rows begin at multiples of 16 bytes: for others
cuBLAS has kernels of an earlier generation only.

`hasten_tower` gives the modules of one model other forwards; classes, names, parameters and folders stay.
Where a module is not as Hugging Face made it (quantised, adapted, watched by hooks, under torch.compile, with
another attention asked for), its own forward runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLMLP,
    Qwen2_5_VLVisionAttention,
    Qwen2_5_VLVisionBlock,
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionAttention

from ..reference.student.model import refuse_replicas
from .elementwise.operator import GateInputs, RotateInputs, gate_product, rotate
from .lesson_modules import normed
from .projections import are_plain

ATTENTIONS = (
    VisionAttention,
    Qwen2_5_VLVisionAttention,
    Qwen3VLVisionAttention,
    Qwen3VLMoeVisionAttention,
)
ALIGNED = 16  # bytes, where a row of a product begins for the fastest kernels

Run = tuple[
    int, Tensor | None
]  # patches of each sequence, and where all of its patches are: None = S, in order


def hasten_tower(model: nn.Module) -> None:
    """Give a model's vision tower the forwards below, in place; models without such a tower stay."""
    for module in model.modules():
        if isinstance(module, ATTENTIONS):
            replace_forward(module, attention)
        elif isinstance(module, Qwen2_5_VLVisionBlock):
            replace_forward(module.norm1, norm)
            replace_forward(module.norm2, norm)
            replace_forward(module.mlp, aligned_mlp)


def replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Let calls of a module run `forward(module, ...)`. A replica of `nn.DataParallel` would run it with this
    module's weights, which are on another GPU, so there are none."""
    module.forward = partial(forward, module)
    module._replicate_for_data_parallel = refuse_replicas


def attention(
    module: nn.Module,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs,
) -> Tensor:
    """The stock attention, all sequences of one length in one call.

    Args:
        module: of ATTENTIONS.
        hidden_states: (S, D).
        cu_seqlens: where sequences begin, and S.
        position_embeddings: cos and sin, (S, N).
        **kwargs: as Hugging Face passes them; read by the stock attention only.
    Returns:
        (S, D).
    """
    if torch.compiler.is_compiling() or module.config._attn_implementation != "sdpa":
        angles = {"cu_seqlens": cu_seqlens, "position_embeddings": position_embeddings}
        return type(module).forward(module, hidden_states, **angles, **kwargs)
    patches = hidden_states.shape[0]
    q, k, v = module.qkv(hidden_states).view(patches, 3, module.num_heads, -1).unbind(1)  # (S, H, N)
    q, k = rotated(q, k, *position_embeddings)
    out = by_length(q, k, v, runs_of(cu_seqlens), module.scaling)
    return module.proj(out.reshape(patches, -1))


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE on q and k, (S, H, N), by the angles (S, N)."""
    if not q.is_cuda or q.dtype == torch.float64:
        return apply_rotary_pos_emb_vision(q, k, cos, sin)
    return tuple(rotate(RotateInputs(each[None], cos[None], sin[None]))[0] for each in (q, k))


def by_length(q: Tensor, k: Tensor, v: Tensor, runs: list[Run], scaling: float) -> Tensor:
    """Softmax attention within each sequence, a call for each length; all (S, H, N)."""
    out = None
    for length, place in runs:
        parts = (each if place is None else each[place] for each in (q, k, v))
        rows = (part.view(-1, length, *part.shape[1:]).transpose(1, 2) for part in parts)  # (n, H, length, N)
        own = scaled_dot_product_attention(*rows, scale=scaling).transpose(1, 2).flatten(0, 1)
        if place is None:
            return own
        out = (torch.zeros_like(q) if out is None else out).index_copy(0, place, own)
    return torch.zeros_like(q) if out is None else out


RUNS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of each tensor of beginnings, while it lives


def runs_of(beginnings: Tensor) -> list[Run]:
    """The sequences of (sequences + 1,) beginnings by length; the device is asked once for each tensor."""
    if beginnings not in RUNS:
        RUNS[beginnings] = runs_by_length(beginnings.tolist(), beginnings.device)
    return RUNS[beginnings]


def runs_by_length(beginnings: list[int], device: torch.device) -> list[Run]:
    """The same, on the host."""
    of_length: dict[int, list[int]] = defaultdict(list)
    for begin, end in pairwise(beginnings):
        if end > begin:
            of_length[end - begin].append(begin)
    if len(of_length) == 1:
        return [(next(iter(of_length)), None)]
    return [
        (length, (torch.tensor(begins)[:, None] + torch.arange(length)).flatten().to(device))
        for length, begins in of_length.items()
    ]


def norm(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """The stock RMS norm, on a GPU in one kernel."""
    forward = normed if hidden_states.is_cuda else type(module).forward
    return forward(module, hidden_states)


def aligned_mlp(module: Qwen2_5_VLMLP, hidden_state: Tensor) -> Tensor:
    """The stock MLP, its width F filled up by zeros: rows begin at multiples of `ALIGNED` bytes."""
    more = -module.intermediate_size % (ALIGNED // hidden_state.element_size())
    plain = are_plain([module.gate_proj, module.up_proj, module.down_proj], hidden_state.dtype)
    if not hidden_state.is_cuda or not more or not plain or torch.compiler.is_compiling():
        return type(module).forward(module, hidden_state)
    return filled_mlp(module, hidden_state, more)


def filled_mlp(module: Qwen2_5_VLMLP, hidden: Tensor, more: int) -> Tensor:
    """The MLP with `more` columns of zeros between its products. silu(0) · 0 = 0: they add nothing."""
    gate, up = (
        F.linear(hidden, F.pad(each.weight, (0, 0, 0, more)), F.pad(each.bias, (0, more)))
        for each in (module.gate_proj, module.up_proj)
    )
    inner, down = gate_product(GateInputs(gate, up)), module.down_proj
    return F.linear(inner, F.pad(down.weight, (0, more)), down.bias)
