"""`reference/window_attention.py`, fast, on the engine of the tensors.

Letters: B batch, L tokens, H query heads, G groups, N head dim of q and k, P head dim of v.
`batched_windows.py` has the equations and the torch engine.
"""

from __future__ import annotations

from torch import Tensor

from ...reference.window_attention import check_window_attention
from ..precision import without_autocast
from ..scan import operator as operators


@without_autocast
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, *, scale: float | None = None
) -> Tensor:
    """`linmu.reference.window_attention`: arguments, result and errors are the same."""
    check_window_attention("window_attention", q, k, v, window_id)
    return planned_attention(q, k, v, window_id, operators.window_plan(window_id), scale=scale)


@without_autocast
def planned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_id: Tensor,
    plan: tuple[Tensor, Tensor],
    *,
    scale: float | None = None,
) -> Tensor:
    """`window_attention` with the plan of `window_id` made before, `VisionLayout.window_plan`'s for one: it
    serves any number of layers and passes."""
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return operators.window_attention(q, k, v, window_id, *plan, scale)[0]
