"""The states at the edges of the chunks, and their gradients, of the torch engine of the scan.

Letters as in `chunk_layout`; equations as in `chunked_scan` and `chunked_scan_backward`. K chunks have K + 1
edges. The forward state at edge k enters chunk k, the backward state at edge k + 1 does; each leaves at the
other edge. What a chunk adds is first put where it leaves, and then carried on in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk_layout import Chunks, Direction, matrices


def edge_states(chunks: Chunks, direction: Direction, start: Tensor | None = None) -> Tensor:
    """Eqs. (4) and (5) of `chunked_scan`: the states at all edges, (K + 1, B, H, N, P).

    Args:
        chunks: all of them.
        direction: one of theirs.
        start: (B, H, N, P), the state at the first edge of the forward direction; zeros if None.
    """
    states = new_edges(chunks)
    leaving = direction.leaving(states)
    for where, slab in chunks.slabs:
        side = slab.backward if direction.reverse else slab.forward
        if side is None:
            leaving[where] = 0
        else:
            x = matrices(slab.x)
            torch.bmm(slab.by_group(writes(slab, side)), x, out=slab.by_group(leaving[where]))
    carry(states, direction.kept, start, reverse=direction.reverse)
    return states


def edge_gradients(
    chunks: Chunks, direction: Direction, y_grad: Tensor, final_grad: Tensor | None = None
) -> Tensor:
    """Eq. (2) of `chunked_scan_backward`: the gradients of the states at all edges, (K + 1, B, H, N, P).

    Args:
        chunks: all of them.
        direction: one of theirs.
        y_grad: (K, B, H, C, P).
        final_grad: (B, H, N, P), the gradient of the state at the last edge; zeros if None.
    """
    grads = new_edges(chunks)
    entering = direction.entering(grads)
    for where, slab in chunks.slabs:
        side = slab.backward if direction.reverse else slab.forward
        if side is None:
            entering[where] = 0
        else:
            read = matrices(reads(slab, side))
            torch.bmm(read.mT, matrices(y_grad[where]), out=matrices(entering[where]))
    carry(grads, direction.kept, final_grad, reverse=not direction.reverse)
    return grads


def writes(slab: Chunks, side: Direction) -> Tensor:
    """What every token adds to the state that leaves, without its x: (K, B, H, N, C)."""
    weight = side.writes.unflatten(2, (slab.x.shape[2], -1))  # (K, B, G, H/G, C)
    return (slab.B[:, :, :, None] * weight[..., None, :]).flatten(2, 3)


def reads(slab: Chunks, side: Direction) -> Tensor:
    """What every token takes of the state that enters: (K, B, H, C, N)."""
    return slab.C * side.reads[..., None]


def new_edges(chunks: Chunks) -> Tensor:
    """Room for the states at all edges."""
    count, batch, heads, _, _, state, head_dim = chunks.sizes
    return chunks.x.new_empty(count + 1, batch, heads, state, head_dim)


def carry(edges: Tensor, kept: Tensor, start: Tensor | None, *, reverse: bool) -> None:
    """Run `s_{k+1} += kept_k s_k` from edge to edge, in place; `reverse`: from the last edge to the first.

    Args:
        edges: (K + 1, B, H, N, P): at each edge what the chunk before it has added; the first is overwritten.
        kept: (K, B, H).
        start: (B, H, N, P), for the first edge; zeros if None.
    """
    edge = edges.unbind(0)
    factor = kept[..., None, None].unbind(0)
    edge[-1 if reverse else 0].copy_(edges.new_zeros(()) if start is None else start)
    for k in reversed(range(len(factor))) if reverse else range(len(factor)):
        source, target = (k + 1, k) if reverse else (k, k + 1)
        edge[target].addcmul_(factor[k], edge[source])
