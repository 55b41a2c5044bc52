"""The attention of decoder layers that were not converted, under the mask that converted layers read.

Converted layers want the padding mask as it is, (B, S) bool, S tokens seen so far and now; building the usual
(B, 1, L, S) mask for them would cost what LinMU saves. So the decoder's attention implementation is "linmu":
its mask function passes the padding mask on, or None without padding, and its attention makes of it, and of
the samples of packed rows, what softmax needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..checks import require
from .packed_rows import SampleSpans
from .split_forward import SplitForward

ATTENTION = "linmu"

_has_padding: ContextVar[bool | None] = ContextVar("whether masks hold padding", default=None)


@contextmanager
def padding_is_known(has_padding: bool) -> Iterator[None]:
    """Within, masks of forwards are taken to hold padding, or none, and the device is not asked: a CUDA graph
    cannot wait for its answer."""
    before = _has_padding.set(has_padding)
    try:
        yield
    finally:
        _has_padding.reset(before)


def padding_mask(
    *,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    kv_length: int,
    kv_offset: int = 0,
    **unused,
) -> Tensor | None:
    """Pass the padding mask to all layers; called once per forward by Hugging Face.

    Args:
        mask_function: what the layers may see, besides padding.
        attention_mask: (B, S) bool, True = not padding; None = no padding.
        kv_length: S, tokens of the past and of this forward.
        kv_offset: the first of them.
    Returns:
        (B, S) bool, or None if there is no padding.
    Raises:
        ValueError: for sliding windows, and for packed sequences of which the model's forward was not told.
    """
    require(
        mask_function is causal_mask_function,
        "padding_mask",
        "attention must be plain causal",
        "packed sequences or a sliding window",
        "call the whole model, for torch.compile and torch.export with an attention_mask in any case",
    )
    if attention_mask is None or not may_hold_padding(attention_mask):
        return None
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def may_hold_padding(attention_mask: Tensor) -> bool:
    """Whether a mask (B, S) must be heeded; it must where its values cannot be asked for."""
    if torch.compiler.is_compiling():  # a graph cannot depend on values, nor its tracer read the variable
        return True
    known = _has_padding.get()
    return not bool(attention_mask.all()) if known is None else known


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    linmu_sequence: Tensor | None = None,
    linmu_spans: SampleSpans | None = None,
    linmu_split: SplitForward | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal softmax attention under a padding mask, in each sample of packed rows.

    Choice: samples one by one, which costs no more than they do alone. Only where padding lies inside of one,
    and under torch.compile, whose graph cannot depend on where they are, all at once under a mask (B, L, L).

    Args:
        module: the attention layer.
        query: (B, H, L, N), the last L of S tokens.
        key, value: (B, G, S, N).
        attention_mask: (B, S) bool, True = not padding; None = no padding.
        linmu_sequence: (B, L) int64, the sample of a token; then S = L. None = one a row.
        linmu_spans: where these samples are; None = look at their ids.
        linmu_split: how the last tokens are split over processes; None = they are not.
        **kwargs: as Hugging Face passes them.
    Returns:
        (B, L, H, N), and None in the place of attention weights. On padding it is anything finite.
    """
    if linmu_split is not None:
        return split_attention(module, query, key, value, linmu_split, **kwargs), None
    spans = None if linmu_spans is None or torch.compiler.is_compiling() else linmu_spans.places
    if spans is not None:
        return sample_by_sample(module, query, key, value, spans, **kwargs), None
    length, total = query.shape[2], key.shape[2]
    if attention_mask is not None or linmu_sequence is not None or 1 < length < total:
        queries = torch.arange(total - length, total, device=query.device)[:, None]
        keys = torch.arange(total, device=query.device)
        mask = (keys <= queries)[None]  # (1, L, S)
        if linmu_sequence is not None:
            mask = mask & (linmu_sequence[:, :, None] == linmu_sequence[:, None, :])  # (B, L, S)
        if attention_mask is not None:
            mask = (mask & attention_mask[:, None]) | (keys == queries)  # (B, L, S)
        attention_mask = mask[:, None].expand(query.shape[0], 1, length, total)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def split_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, split: SplitForward, **kwargs
) -> Tensor:
    """Causal softmax attention of this rank's queries, the last n of the T tokens up to its own last.

    Without padding and packed rows there is no mask of n · T booleans: flash attention knows which corner the
    diagonal ends in.

    Args:
        query: (B, H, n, N).
        key, value: (B, G, S + n, N), of the tokens before the prompt and of this rank.
        split: who holds which tokens.
    Returns:
        (B, n, H, N).
    """
    key, value = split.everything_before(key), split.everything_before(value)
    length, total, mask = query.shape[2], key.shape[2], None
    padded = split.valid is not None or (split.past and split.attention_mask is not None)
    if padded or split.sequence is not None:
        keys = torch.arange(total, device=query.device)
        queries = keys[total - length :, None]
        seen = keys <= queries
        if padded:
            seen = seen & split.attention_mask[:, None, :total].bool()
        if split.sequence is not None:
            samples = split.sequence[:, None, :total]
            seen = seen & (samples == samples[..., total - length :].mT)
        mask = (seen | (keys == queries))[:, None]  # (B, 1, n, T)
    elif 1 < length < total:
        mask = causal_lower_right(length, total)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]


def sample_by_sample(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, spans: list[list[slice]], **kwargs
) -> Tensor:
    """Causal softmax attention of each sample alone, (B, L, H, N), 0 between them; arguments as above."""
    rows = []
    for row, samples in enumerate(spans):
        one, parts, place = slice(row, row + 1), [], 0
        for span in [*samples, slice(query.shape[2], query.shape[2])]:
            parts.append(query.new_zeros(1, span.start - place, query.shape[1], value.shape[3]))
            if span.stop > span.start:
                own = (tensor[one, :, span] for tensor in (query, key, value))
                parts.append(sdpa_attention_forward(module, *own, None, **kwargs)[0])
            place = span.stop
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, causal_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, padding_mask)
