"""Window attention with FlashAttention-2's backward pass (arXiv 2307.08691), which uses the stored output.

The gradient of the scores is P (dP - δ) with δ = o·do, o as it was rounded and stored.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from linmu import reference
from linmu.reference import local_swin, scan_order, window_ids  # noqa: F401  the layout is not on trial
from linmu.reference.numerics import accumulation_dtype, without_autocast
from linmu.reference.window_attention import check_window_attention

from .common import per_head


class Attention(torch.autograd.Function):
    """q (B, L, H, N), k (B, L, G, N), v (B, L, G, P), ids (B, L), scale -> (B, L, H, P)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, scale: float) -> Tensor:
        wide, heads = accumulation_dtype(q.dtype), q.shape[2]
        inside = (ids >= 0)[..., None, None]
        wq, wk, wv = (torch.where(inside, tensor.to(wide), 0.0) for tensor in (q, k, v))
        wk, wv = per_head(wk, heads), per_head(wv, heads)
        mates = ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None])[:, None]
        scores = scale * torch.einsum("bihn,bjhn->bhij", wq, wk)
        logsumexp = scores.masked_fill(~mates, -torch.inf).logsumexp(-1, keepdim=True)  # (B, H, L, 1)
        weights = torch.where(mates, (scores - logsumexp.nan_to_num(neginf=0.0)).exp(), 0.0)
        output = torch.einsum("bhij,bjhp->bihp", weights, wv).to(q.dtype)
        ctx.save_for_backward(q, k, v, ids, output, logsumexp)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, asked: Tensor):
        q, k, v, ids, output, logsumexp = ctx.saved_tensors
        wide, heads, ratio = logsumexp.dtype, q.shape[2], q.shape[2] // k.shape[2]
        inside = (ids >= 0)[..., None, None]
        wq, wk, wv = (torch.where(inside, tensor.to(wide), 0.0) for tensor in (q, k, v))
        wk, wv, asked = per_head(wk, heads), per_head(wv, heads), asked.to(wide)
        mates = ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None])[:, None]
        scores = ctx.scale * torch.einsum("bihn,bjhn->bhij", wq, wk)
        weights = torch.where(mates, (scores - logsumexp.nan_to_num(neginf=0.0)).exp(), 0.0)
        delta = (output.to(wide) * asked).sum(-1).transpose(1, 2)[..., None]  # (B, H, L, 1)
        of_values = torch.einsum("bhij,bihp->bjhp", weights, asked)
        of_scores = weights * (torch.einsum("bihp,bjhp->bhij", asked, wv) - delta) * ctx.scale
        of_queries = torch.einsum("bhij,bjhn->bihn", of_scores, wk)
        of_keys = torch.einsum("bhij,bihn->bjhn", of_scores, wq)
        of_keys, of_values = (part.unflatten(2, (-1, ratio)).sum(3) for part in (of_keys, of_values))
        return of_queries.to(q.dtype), of_keys.to(k.dtype), of_values.to(v.dtype), None, None


@without_autocast
def window_attention(q, k, v, window_id, *, scale=None):
    check_window_attention("window_attention", q, k, v, window_id)
    return Attention.apply(q, k, v, window_id, q.shape[3] ** -0.5 if scale is None else scale)


class LocalSwin(reference.LocalSwin):
    """The branch around it."""

    def forward(self, *given, **named):
        with mock.patch.object(local_swin, "window_attention", window_attention):
            return super().forward(*given, **named)
