"""The torch engine of window attention: windows of like size in one batch, forward and backward.

Letters: B batch, L tokens, H query heads, G groups, N head dim of q and k, P head dim of v; in a batch of
windows W windows of at most M tokens each.

    p_ij = exp(scale q_i·k_j - lse_i)        o_i = Σ_j p_ij v_j                                            (1)
    ḡ_ij = p_ij (ō_i·v_j - ō_i·o_i)        q̄ = scale ḡ k        k̄ = scale ḡᵀ q        v̄ = pᵀ ō          (2)

Each batch holds the windows whose sizes lie between two powers of two, so that a few large windows do not pad
many small ones. Finding the windows asks the device for their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..layout.tokens import gather_tokens
from .operator import AttentionGrads, AttentionInputs, AttentionOutputs, attention_outputs

SLAB_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of the scores of one batch of windows


@dataclass(frozen=True)
class Windows:
    """W windows, padded to M tokens.

    Args:
        token: (W, M) int64, index into the B·L tokens of the flattened batch; padding repeats a member.
        member: (W, M) bool, True = not padding.
    """

    token: Tensor
    member: Tensor

    def gather(self, tensor: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """(B, L, heads or groups, ·) -> (W, heads, M, ·) in `dtype`, groups repeated."""
        rows = gather_tokens(tensor, self.token.flatten())
        rows = rows.view(*self.token.shape, *tensor.shape[2:]).transpose(1, 2).to(dtype)
        return rows.repeat_interleave(heads // rows.shape[1], dim=1)

    def scatter(self, rows: Tensor, tensor: Tensor) -> None:
        """Write (W, heads, M, ·) to the tokens of (B, L, heads, ·); a token is in one window only."""
        tensor.flatten(0, 1)[self.token[self.member]] = rows.transpose(1, 2)[self.member].to(tensor.dtype)


def batches(window_id: Tensor, heads: int) -> Iterator[Windows]:
    """All windows of (B, L) ids, those of like size together, cut into slabs."""
    batch, length = window_id.shape
    row = torch.arange(batch, device=window_id.device)[:, None].expand(batch, length)
    inside = window_id >= 0
    found, number = window_id[inside].unique(return_inverse=True)  # ids may be large: numbers are not
    if not len(found):
        return
    # not `unique(dim=0)` of the pairs, which takes a processor 20 times as long
    pairs = row[inside] * len(found) + number  # (n,)
    _, number, counts = pairs.unique(return_inverse=True, return_counts=True)
    token = inside.flatten().nonzero().squeeze(1)[number.argsort(stable=True)]  # (n,): window by window
    starts = counts.cumsum(0) - counts
    magnitude = (
        (counts - 1).clamp_min(0).float().log2().floor()
    )  # the scores grow fourfold from one to the next
    for level in magnitude.unique():
        chosen = (magnitude == level).nonzero().squeeze(1)
        longest = int(counts[chosen].max())
        per_window = heads * longest * longest
        step = max(1, SLAB_ELEMENTS.get(window_id.device.type, 2**20) // per_window)
        for some in chosen.split(step):
            place = torch.arange(longest, device=window_id.device)
            member = place < counts[some, None]
            yield Windows(token[starts[some, None] + torch.where(member, place, 0)], member)


def probabilities(q: Tensor, k: Tensor, member: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """p of eq. (1), (W, H, M, M), and lse, (W, H, M)."""
    scores = (q @ k.mT).mul_(scale).masked_fill_(~member[:, None, None, :], -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_(), lse


def forward(inputs: AttentionInputs) -> AttentionOutputs:
    """Eq. (1); o and lse are 0 where the id is -1."""
    o, lse = (empty.zero_() for empty in attention_outputs(inputs))
    heads = inputs.q.shape[2]
    for windows in batches(inputs.window_id, heads):
        queries, keys, values = (windows.gather(tensor, heads, lse.dtype) for tensor in inputs[:3])
        weights, log_sum = probabilities(queries, keys, windows.member, inputs.scale)
        windows.scatter(weights @ values, o)
        windows.scatter(log_sum[..., None], lse[..., None])
    return AttentionOutputs(o, lse)


def backward(inputs: AttentionInputs, outputs: AttentionOutputs, grads: AttentionOutputs) -> AttentionGrads:
    """Eq. (2): the gradients of q, k and v, in their dtypes."""
    accumulate, heads, groups = accumulation_dtype(inputs.q.dtype), inputs.q.shape[2], inputs.k.shape[2]
    zeros = (torch.zeros_like(each, memory_format=torch.contiguous_format) for each in inputs[:3])
    q_grad, k_grad, v_grad = found = AttentionGrads(*zeros)
    for windows in batches(inputs.window_id, heads):
        queries, keys, values = (windows.gather(tensor, heads, accumulate) for tensor in inputs[:3])
        grad = windows.gather(grads.o, heads, accumulate) * windows.member[:, None, :, None]
        weights, _ = probabilities(queries, keys, windows.member, inputs.scale)
        weights_grad = grad @ values.mT
        products = (weights * weights_grad).sum(-1, keepdim=True)
        scores_grad = weights * (weights_grad - products) * inputs.scale
        windows.scatter(scores_grad @ keys, q_grad)
        windows.scatter(group_sum(scores_grad.mT @ queries, groups), k_grad)
        windows.scatter(group_sum(weights.mT @ grad, groups), v_grad)
    return found


def group_sum(grad: Tensor, groups: int) -> Tensor:
    """(W, H, M, ·) -> (W, G, M, ·): the heads of a group share its keys and values."""
    return grad.unflatten(1, (groups, -1)).sum(2)
