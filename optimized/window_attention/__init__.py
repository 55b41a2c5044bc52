"""Window attention: `reference/window_attention.py`, all windows at once.

Letters: B batch, L tokens, H query heads, G groups, N head dim of q and k, P head dim of v. `torch_engine`
has the equations, `operator` what is registered, `kernels` and `kernels_backward` the Triton engine, and
`tiles` what they share.
"""

from __future__ import annotations

from torch import Tensor

from ...reference.window_attention import check_window_attention
from ..layout.operator import Plan, WindowPlanInputs, window_plan
from . import operator
from .operator import AttentionInputs

__all__ = ["planned_attention", "window_attention"]


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, *, scale: float | None = None
) -> Tensor:
    """`linmu.reference.window_attention`: arguments, result and errors are the same."""
    check_window_attention("window_attention", q, k, v, window_id)
    return planned_attention(q, k, v, window_id, window_plan(WindowPlanInputs(window_id)), scale=scale)


def planned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_id: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    engine: str | None = None,
) -> Tensor:
    """`window_attention` with a plan of `window_id` made before, as `VisionLayout.window_plan`'s, which
    serves any number of layers and passes.
    """
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return operator.window_attention(AttentionInputs(q, k, v, window_id, *plan, scale, engine))[0]
