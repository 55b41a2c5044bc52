"""The states at the edges of the chunks, and their gradients, of the torch engine of the scan.

Letters as in `chunks`; equations as in `torch_engine` and its `backward`. K chunks have K + 1 edges.
The forward state at edge k enters chunk k, the reverse state at edge k + 1 does; each leaves at the other
edge. What a chunk adds is first put where it leaves, and then carried on in place. All goes slab by slab,
while a processor's cache still holds what the last step has made. A reader that takes slabs as they come
holds the states of one slab at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .chunks import Chunks, Direction, matrices

Fill = Callable[[slice, Chunks, Direction, Tensor], object]


def edge_states(chunks: Chunks, direction: Direction, start: Tensor | None = None) -> Iterator[Tensor | None]:
    """Eqs. (4) and (5) of `torch_engine`: the states at the edges of each slab, in the direction's order.

    Args:
        chunks: all of them.
        direction: one of theirs.
        start: (B, H, N, P), the state at the direction's first edge; zeros if None.
    Yields:
        (K + 1, B, H, N, P) for a slab of K chunks, None where the slab leaves the direction out.
    """

    def fill(where: slice, slab: Chunks, side: Direction, edges: Tensor) -> None:
        leaving = slab.by_group(side.leaving(edges))
        torch.bmm(slab.by_group(writes(slab, side)), matrices(slab.x), out=leaving)

    return sweep(chunks, direction, fill, start, reverse=direction.reverse)


def last_state(chunks: Chunks, direction: Direction) -> Tensor:
    """What all tokens add to the state that leaves at the direction's last edge: (B, H, N, P)."""
    _, batch, heads, _, _, state, head_dim = chunks.sizes
    last = chunks.x.new_zeros(batch, heads, state, head_dim)
    slabs = reversed(chunks.slabs) if direction.reverse else chunks.slabs
    for (where, _), edges in zip(slabs, edge_states(chunks, direction), strict=True):
        if edges is None:
            last = last * direction.chunk_decay[where].prod(0)[..., None, None]
        else:
            last = edges[0 if direction.reverse else -1]
    return last


def edge_gradients(
    chunks: Chunks, direction: Direction, y_grad: Tensor, final_grad: Tensor | None = None
) -> Iterator[Tensor | None]:
    """Eq. (2) of `torch_engine.backward`: the gradients of the states at the edges of each slab, against the
    direction's order.

    Args:
        chunks: all of them.
        direction: one of theirs.
        y_grad: (K, B, H, C, P).
        final_grad: (B, H, N, P), the gradient of the state at the last edge; zeros if None.
    Yields:
        As `edge_states`.
    """

    def fill(where: slice, slab: Chunks, side: Direction, edges: Tensor) -> None:
        entering = matrices(side.entering(edges))
        torch.bmm(matrices(reads(slab, side)).mT, matrices(y_grad[where]), out=entering)

    return sweep(chunks, direction, fill, final_grad, reverse=not direction.reverse)


def sweep(
    chunks: Chunks, direction: Direction, fill: Fill, state: Tensor | None, *, reverse: bool
) -> Iterator[Tensor | None]:
    """Carry a state from slab to slab, `reverse` from the end, once `fill` has put what each chunk adds."""
    for where, slab in reversed(chunks.slabs) if reverse else chunks.slabs:
        side = slab.reverse if direction.reverse else slab.forward
        if side is None:
            state = None if state is None else state * direction.chunk_decay[where].prod(0)[..., None, None]
            yield None
            continue
        edges = new_edges(slab)
        fill(where, slab, side, edges)
        carry(edges, side.chunk_decay, state, reverse=reverse)
        state = edges[0 if reverse else -1]
        yield edges


def writes(slab: Chunks, side: Direction) -> Tensor:
    """What every token adds to the state that leaves, without its x: (K, B, H, N, C)."""
    weight = side.writes.unflatten(2, (slab.x.shape[2], -1))  # (K, B, G, H/G, C)
    return (slab.B[:, :, :, None] * weight[..., None, :]).flatten(2, 3)


def reads(slab: Chunks, side: Direction) -> Tensor:
    """What every token takes of the state that enters: (K, B, H, C, N)."""
    return slab.C * side.reads[..., None]


def new_edges(slab: Chunks) -> Tensor:
    """Room for the states at the edges of a slab."""
    count, batch, heads, _, _, state, head_dim = slab.sizes
    return slab.x.new_empty(count + 1, batch, heads, state, head_dim)


def carry(edges: Tensor, chunk_decay: Tensor, start: Tensor | None, *, reverse: bool) -> None:
    """Run `s_{k+1} += kept_k s_k` from edge to edge, in place; `reverse`: from the last edge to the first.

    Args:
        edges: (K + 1, B, H, N, P): at each edge what the chunk before it has added; the first is overwritten.
        chunk_decay: (K, B, H).
        start: (B, H, N, P), for the first edge; zeros if None.
    """
    edge = edges.unbind(0)
    factor = chunk_decay[..., None, None].unbind(0)
    edge[-1 if reverse else 0].copy_(edges.new_zeros(()) if start is None else start)
    for k in reversed(range(len(factor))) if reverse else range(len(factor)):
        source, target = (k + 1, k) if reverse else (k, k + 1)
        edge[target].addcmul_(factor[k], edge[source])
