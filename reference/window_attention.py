"""Softmax attention inside each 3-D window, one window at a time.

Letters: B batch, L tokens, H query heads, G groups, N head dim of q and k, P head dim of v. Head h reads
group h // (H/G).

    o_i = Σ_j softmax_j(scale · q_i·k_j) v_j                                                              (1)
          over all tokens j of the row in the same window as i (no causal mask)

Local-Swin's attention (LinMU, arXiv 2601.01322), after Swin (arXiv 2103.14030) in three axes. A window is the
set of tokens with one id, whatever their number. Cost: a loop over ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require_float, require_groups, require_int64, require_one_device, require_shape
from .numerics import accumulation_dtype, repeat_groups, without_autocast, zero_where_masked


@without_autocast
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend to the tokens of the same row in the same window; eq. (1) (LinMU, arXiv 2601.01322).

    Args:
        q: (B, L, H, N), any float dtype.
        k: (B, L, G, N).
        v: (B, L, G, P).
        window_id: (B, L) int64; -1 = in no window.
        scale: factor on q·k; None = N**-0.5, as attention has.
    Returns:
        (B, L, H, P) in the dtype of `q`; 0 where the id is -1. Softmax and sums run in float32, or in
            float64 for float64 input.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    check_window_attention("window_attention", q, k, v, window_id)
    heads, dtype = q.shape[2], q.dtype
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k, v = (tensor.to(accumulation_dtype(dtype)) for tensor in (q, k, v))
    k, v = repeat_groups(k, heads), repeat_groups(v, heads)  # (B, L, H, N), (B, L, H, P)
    output = q.new_zeros(*q.shape[:3], v.shape[3])
    for window in window_id[window_id >= 0].unique().tolist():
        member = window_id == window  # (B, L)
        columns = member.any(0).nonzero().squeeze(-1)  # (n,): tokens in this window in at least one row
        attended = attend(q[:, columns], k[:, columns], v[:, columns], member[:, columns], scale)
        output = output.index_add(1, columns, attended)
    return output.to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, member: Tensor, scale: float) -> Tensor:
    """Eq. (1) for one window: q, k (B, n, H, N), v (B, n, H, P) -> (B, n, H, P).

    `member` (B, n) bool says which of the n tokens are in it, row by row; elsewhere the result is 0.
    """
    q, k, v = (zero_where_masked(tensor, member[..., None, None]) for tensor in (q, k, v))
    scores = scale * torch.einsum("bihn,bjhn->bhij", q, k)
    lowest = torch.finfo(scores.dtype).min  # finite, so that rows without members give no NaN
    scores = torch.where(member[:, None, None, :], scores, scores.new_full((), lowest))
    output = torch.einsum("bhij,bjhp->bihp", scores.softmax(-1), v)  # eq. (1)
    return zero_where_masked(output, member[..., None, None])


def check_window_attention(where: str, q, k, v, window_id) -> None:
    """Shapes, dtypes and devices of the attention's arguments."""
    require_float(where, q=q, k=k, v=v)
    require_shape(where, "q", q, (None, None, None, None), "B, L, H, N")
    batch, length, heads, state = q.shape
    require_shape(where, "k", k, (batch, length, None, state), "B, L, G, N")
    groups = k.shape[2]
    require_groups(where, heads, groups)
    require_shape(where, "v", v, (batch, length, groups, None), "B, L, G, P")
    require_int64(where, "window_id", window_id, (batch, length), "B, L")
    require_one_device(where, q=q, window_id=window_id)
