"""Window attention of a split prompt: a window is computed by the rank that holds its first token.

So only tokens of windows that an edge cuts travel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...numerics import (
    without_autocast,
)
from .ranks import ContextParallel
from .routes import Route


@without_autocast
def window_attention(parallel: ContextParallel, q, k, v, window_id, *, scale=None, key=None):
    """`window_attention` of this rank's q, k, v with the prompt's window_id (B, L).

    Layers of one `key` have the same ids; None = find the way anew. A window is computed by the rank that
    holds its first token; so what travels is what is cut off.
    """
    make = partial(to_windows, parallel, window_id)
    route, here = make() if key is None else parallel.once(key, make)
    arrived, has_more = route.there(q, k, v), False
    if torch.is_grad_enabled() or not len(arrived[0]):
        # One token of zeros more, in a window of its own: every rank runs the operator and its gradient,
        # also where no token is in a window, so that the collectives of backward pair up.
        arrived, has_more = [torch.cat([t, t.new_zeros(1, *t.shape[1:])]) for t in arrived], True
    if not has_more:
        bare = here[:, :-1]
        here = bare if key is None else parallel.once((key, "bare"), lambda: bare)
    o = parallel.operators.window_attention(*(t[None] for t in arrived), here, scale=scale)
    return route.back(o[0, :-1] if has_more else o[0])


def to_windows(parallel: ContextParallel, window_id: Tensor) -> tuple[Route, Tensor]:
    """The route to the ranks that compute the windows (B, L), and the ids there, (1, M + 1)."""
    ids, destination, _ = find_holders(parallel, window_id)
    route = Route(destination, torch.arange(ids.numel(), device=ids.device).view_as(ids), parallel)
    return route, torch.cat([route.of_prompt(ids), ids.amax().clamp(min=-1).view(1) + 1])[None]


def find_holders(parallel: ContextParallel, window_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of windows (B, L): ids that no two rows share, which rank computes each token's, and whether a cut
    goes through it, (B, L) each.
    """
    rows = torch.arange(len(window_id), device=window_id.device)[:, None]
    ids = torch.where(window_id < 0, -1, window_id * len(window_id) + rows)  # rows side by side
    found, inverse = ids.flatten().unique(return_inverse=True)
    owner = parallel.owner.expand_as(ids)
    first, last = (
        owner.new_full(found.shape, fill).scatter_reduce(0, inverse, owner.flatten(), which)
        for fill, which in ((parallel.ranks, "amin"), (-1, "amax"))
    )
    destination = torch.where(ids < 0, owner, first[inverse].view_as(ids))
    return ids, destination, (ids >= 0) & (first != last)[inverse].view_as(ids)
