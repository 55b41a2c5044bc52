"""Eq. (3) of the scan in chunks, slab by slab; then the norm of each head, and back to token order.

Letters and equations as in `torch_engine`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operator import ScanInputs, ScanOutputs
from ..two_steps import Begun
from .chunks import Chunks, Pairs, cut, matrices, pair_decays
from .norm import normed
from .states import edge_states, last_state, reads


def forward(inputs: ScanInputs) -> ScanOutputs:
    """The operator on the torch engine."""
    y, final_state = scanned(inputs)
    return normed(inputs, y, final_state)


def begin(inputs: ScanInputs) -> Begun:
    """`two_steps.begin` on the torch engine."""
    chunks = cut(inputs)
    added = torch.stack([last_state(chunks, side) for side in chunks.directions])
    decay = torch.stack([side.chunk_decay.prod(0) for side in chunks.directions])
    return Begun(inputs, added, decay, chunks)


def finish(inputs: ScanInputs, begun: Begun, entering: list[Tensor | None]) -> Tensor:
    """`two_steps.finish` on the torch engine."""
    return normed(inputs, *outputs(inputs, begun.kept, *entering)).y


def scanned(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Eq. (3): y (B, L, H, P) in the dtype of `x` and scan order, and the final state (B, H, N, P)."""
    return outputs(inputs, cut(inputs), inputs.initial_state)


def outputs(
    inputs: ScanInputs, chunks: Chunks, start: Tensor | None, end: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`scanned`, from the state before the first token and, of the reverse direction, behind the last."""
    x = inputs.x
    count, batch, heads, size, _, _, head_dim = chunks.sizes
    y = x.new_empty(batch, count, size, heads, head_dim)
    states = [edge_states(chunks, chunks.forward, start)]
    if chunks.reverse is not None:
        states.append(reversed([*edge_states(chunks, chunks.reverse, end)]))
    for (where, slab), *edges in zip(chunks.slabs, *states, strict=True):
        y[:, where] = slab_output(slab, edges, inputs.D).permute(1, 0, 3, 2, 4)
    return y.flatten(1, 2)[:, : x.shape[1]].contiguous(), edges[0][-1].clone()


def slab_output(slab: Chunks, edges: list[Tensor], D: Tensor | None) -> Tensor:
    """Eq. (3) of one slab, (K, B, H, C, P), from the states of each direction at its edges."""
    weights = pair_decays(slab).mul_(Pairs.of(slab).gates).mul_(slab.dt[..., None, :])
    scores = slab.by_head(torch.bmm(slab.by_group(slab.C), matrices(slab.B))).mul_(weights)
    add_skip(scores, D)
    y = slab.by_head(torch.bmm(slab.by_group(scores), matrices(slab.x)))
    for side, states in zip(slab.directions, edges, strict=False):
        matrices(y).baddbmm_(matrices(reads(slab, side)), matrices(side.entering(states)))
    return y


def add_skip(weights: Tensor, D: Tensor | None) -> None:
    """Let each token write to itself with weight D as well: add it to the diagonal of (..., H, C, C)."""
    if D is not None:
        weights.diagonal(dim1=-2, dim2=-1).add_(D.to(weights.dtype)[:, None])
