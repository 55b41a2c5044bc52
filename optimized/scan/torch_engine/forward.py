"""The torch engine of the scan: both directions as matrices over chunks of tokens, forward and backward.

Letters: B batch, L tokens, H heads, G groups, N state size, P head dim, K chunks of C tokens. Inside a chunk
i is the reading and j the writing token; S_F is the forward state before a chunk, S_R the backward state
after it.

    f_i = Σ_{k≤i} a_k,  a = dt A          b_i = Σ_{k<i} a_k over vision only                              (1)
    W_ij = dt_j · (gF_i [j≤i] exp(f_i - f_j) + gB_i [j≥i, one segment] exp(b_j - b_i))                     (2)
    y_i = Σ_j W_ij (C_i·B_j) x_j  +  gF_i e^{f_i} S_Fᵀ C_i  +  gB_i e^{b_end - b_i} S_Rᵀ C_i  +  D x_i     (3)
    S_F(next chunk)     = e^{f_end} S_F + Σ_j e^{f_end - f_j} dt_j B_j ⊗ x_j                              (4)
    S_R(previous chunk) = e^{b_end} S_R + Σ_j e^{b_j} dt_j B_j ⊗ x_j      j of the segment that is read    (5)

gF is the gate on vision and 1 on text, gB is 1 - gate on vision and 0 on text: one C Bᵀ serves both
directions, the forward weights below its diagonal, the backward weights above. All exponents are differences
≤ 0 and clamped there. This is Mamba2's chunked form (arXiv 2405.21060, section 6) of `reference/scan.py`,
eqs. (1) to (3). Time and memory are linear in L; work goes through slabs of chunks small enough for a
processor's cache, laid out as `chunk_layout` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...precision import without_autocast
from .chunks import Chunks, cut, matrices
from .pairs import Pairs, pair_decays
from .states import edge_states, reads


@without_autocast
def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    gate: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Eq. (3): y (B, L, H, P) in the dtype of `x` and the final forward state (B, H, N, P)."""
    chunks = cut(x, dt, A, B, C, gate, segment, valid)
    count, batch, heads, size, _, _, head_dim = chunks.sizes
    y = x.new_empty(batch, count, size, heads, head_dim)
    states = [edge_states(chunks, chunks.forward, initial_state)]
    if chunks.backward is not None:
        states.append(reversed([*edge_states(chunks, chunks.backward)]))
    for (where, slab), *edges in zip(chunks.slabs, *states, strict=True):
        y[:, where] = slab_output(slab, edges, D).permute(1, 0, 3, 2, 4)
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
