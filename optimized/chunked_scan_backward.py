"""The gradient of `chunked_scan.forward`, slab by slab, with everything but the chunk states recomputed.

Letters as in `chunked_scan`; ȳ is the gradient of y, and so on. With M = C Bᵀ, V = ȳ xᵀ and W of eq. (2)
there:

    C̄ = (V∘W) B      B̄ = (V∘W)ᵀ C      x̄ = (M∘W)ᵀ ȳ        plus what passes through the states        (1)
    S̄_F(before) = e^{f_end} S̄_F(after) + Σ_i gF_i e^{f_i} C_i ⊗ ȳ_i       S̄_R alike, the other way      (2)
    ā_k = Σ_{i≥k>j} U_ij,  U = M∘V∘W        and for the backward direction  Σ_{i≤k<j} U_ij               (3)

Eq. (3) sums the products that span token k, all of them direct: a difference of row and column sums, which is
cheaper, loses what cancels. Writes to and reads from the states span from the token to the chunk's edge.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .chunked_scan import Chunks, backward_states, carry, cut, decay_matrix, forward_states, gates
from .precision import without_autocast
from .scan_decays import join_tokens, reverse_cumsum, split_tokens, unsqueeze_like
from .scan_masks import vision_mask


@dataclass
class Gradients:
    """What one slab adds: tokens (B, slab, H, C, ·) per head, scalars (B, slab, H, C)."""

    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor  # at fixed a = dt A
    a: Tensor
    gate: Tensor  # of gF minus gB: both come from one gate

    @classmethod
    def join(cls, slabs: list[Gradients]) -> Gradients:
        """All slabs as one."""
        parts = ([getattr(slab, entry.name) for slab in slabs] for entry in fields(cls))
        return cls(*(torch.cat(part, dim=1) for part in parts))


@dataclass(frozen=True)
class Carried:
    """One direction's states and their gradients at the edge of each chunk, all (B, K, H, N, P)."""

    entering: Tensor  # the state that the chunk's tokens read
    leaving_grad: Tensor  # the gradient of the state that the chunk hands on


@without_autocast
def backward(
    y_grad: Tensor,
    final_grad: Tensor,
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
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, gate, D and initial_state, each in its accumulation dtype; eqs. (1) to
    (3).
    """
    chunks = cut(x, dt, A, B, C, gate, segment, valid)
    length, groups = x.shape[1:3]
    y_grad = y_grad.to(chunks.x.dtype)
    if valid is not None:
        y_grad = torch.where(unsqueeze_like(valid, y_grad), y_grad, y_grad.new_zeros(()))
    y_grad = split_tokens(y_grad, chunks.x.shape[2], 0)  # (B, K, C, H, P)
    forward_side, initial_grad = forward_carried(chunks, y_grad, final_grad, initial_state)
    backward_side = None if chunks.decays.segment is None else backward_carried(chunks, y_grad)
    total = Gradients.join(
        [slab_gradients(chunks, slab, y_grad, forward_side, backward_side, D) for slab in chunks.slabs]
    )
    dt_grad = total.dt + total.a * chunks.decays.A[:, None]
    rate_grad = (total.a * chunks.decays.dt).sum((0, 1, 3))
    skip_grad = None if D is None else skip_gradient(chunks, y_grad)

    def tokens(grad: Tensor) -> Tensor:
        grad = grad.unflatten(2, (groups, -1)).sum(3) if grad.shape[2] != groups else grad
        return join_tokens(grad.transpose(2, 3), length)

    def scalars(grad: Tensor, mask: Tensor | None) -> Tensor:
        grad = join_tokens(grad.transpose(2, 3), length)
        return grad if mask is None else torch.where(mask[..., None], grad, grad.new_zeros(()))

    return (
        tokens(total.x),
        scalars(dt_grad, valid),
        rate_grad,
        tokens(total.B),
        join_tokens(total.C.transpose(2, 3), length),
        None if gate is None else scalars(total.gate, vision_mask(segment, valid)),
        skip_grad,
        None if initial_state is None else initial_grad,
    )


def skip_gradient(chunks: Chunks, y_grad: Tensor) -> Tensor:
    """The gradient of D, (H,)."""
    grad = y_grad.unflatten(3, (chunks.x.shape[3], -1))  # (B, K, C, G, H/G, P)
    return torch.einsum("bkcgrp,bkcgp->gr", grad, chunks.x).flatten()


def forward_carried(
    chunks: Chunks, y_grad: Tensor, final_grad: Tensor, initial_state: Tensor | None
) -> tuple[Carried, Tensor]:
    """The forward states and their gradients, eq. (2), and the gradient of the initial state."""
    entering, _ = forward_states(chunks, initial_state)
    reads = read_gradients(chunks, y_grad, forward_weight(chunks))
    leaving, initial_grad = carry(reads, chunks.decays.forward_kept(), final_grad, reverse=True)
    return Carried(entering, leaving), initial_grad


def backward_carried(chunks: Chunks, y_grad: Tensor) -> Carried:
    """The backward states and their gradients, eq. (2) the other way."""
    reads = read_gradients(chunks, y_grad, backward_weight(chunks))
    leaving, _ = carry(reads, chunks.decays.backward_kept(), None)
    return Carried(backward_states(chunks), leaving)


def forward_weight(chunks: Chunks):
    """gF_i e^{f_i} of one slab."""
    return lambda slab: chunks.decays.forward_read(slab) * chunks.decays.forward_gate[:, slab]


def backward_weight(chunks: Chunks):
    """gB_i e^{b_end - b_i} of one slab."""
    return lambda slab: chunks.decays.backward_read(slab) * chunks.decays.backward_gate[:, slab]


def read_gradients(chunks: Chunks, y_grad: Tensor, weight) -> Tensor:
    """Σ_i weight_i C_i ⊗ ȳ_i of every chunk, (B, K, H, N, P)."""
    batch, count = chunks.x.shape[:2]
    sizes = (chunks.heads, chunks.C.shape[-1], chunks.x.shape[-1])
    states = chunks.x.new_empty(batch, count, *sizes)
    for slab in chunks.slabs:
        C, grad = chunks.per_head(chunks.C, slab), chunks.per_head(y_grad, slab)
        states[:, slab] = (C * weight(slab)[..., None]).mT @ grad
    return states


def slab_gradients(
    chunks: Chunks,
    slab: slice,
    y_grad: Tensor,
    forward_side: Carried,
    backward_side: Carried | None,
    D: Tensor | None,
) -> Gradients:
    """All gradients of the tokens of one slab."""
    grads = inside_chunk(chunks, slab, y_grad, D)
    through_forward_state(grads, chunks, slab, y_grad, forward_side)
    if backward_side is not None:
        through_backward_state(grads, chunks, slab, y_grad, backward_side)
    groups = chunks.x.shape[3]
    grads.x = grads.x.unflatten(2, (groups, -1)).sum(3)
    grads.B = grads.B.unflatten(2, (groups, -1)).sum(3)
    return grads


def inside_chunk(chunks: Chunks, slab: slice, y_grad: Tensor, D: Tensor | None) -> Gradients:
    """What tokens of one chunk owe each other; eqs. (1) and (3)."""
    q, k, v, grad = (chunks.per_head(t, slab) for t in (chunks.C, chunks.B, chunks.x, y_grad))
    dt = chunks.decays.dt[:, slab, :, None]  # (B, slab, H, 1, C)
    decay, before, together = decay_matrix(chunks.decays, slab)
    gate = gates(chunks.decays, slab, before, together)
    weights = decay * gate * dt
    scores, target = q @ k.mT, grad @ v.mT
    scores_grad = target * weights
    spent = scores * target * decay
    gated = spent * gate
    products = gated * dt  # U of eq. (3)
    spent = spent * dt
    gate_grad = (spent * before).sum(-1)
    if together is not None:
        gate_grad -= (spent * together).sum(-1)
    x_grad = (scores * weights).mT @ grad
    if D is not None:
        x_grad += grad * D.to(grad.dtype)[:, None, None]
    return Gradients(
        x=x_grad,
        B=scores_grad.mT @ q,
        C=scores_grad @ k,
        dt=gated.sum(-2),
        a=spanning(products, chunks, slab, before),
        gate=gate_grad,
    )


def spanning(products: Tensor, chunks: Chunks, slab: slice, before: Tensor) -> Tensor:
    """Eq. (3): (B, slab, H, C, C) -> (B, slab, H, C)."""
    ones = before.to(products.dtype)
    from_left = (ones.T @ products * before.tril(-1)).sum(-1)  # Σ_{i≥k} Σ_{j<k}
    if chunks.decays.segment is None:
        return from_left
    from_right = (ones @ products * before.T.triu(1)).sum(-1)  # Σ_{i≤k} Σ_{j>k}
    return from_left + from_right * (chunks.decays.segment[:, slab] >= 0)


def through_forward_state(
    grads: Gradients, chunks: Chunks, slab: slice, y_grad: Tensor, side: Carried
) -> None:
    """What passes through S_F: read at its chunk's tokens, written by them, handed on."""
    q, k, v, grad = (chunks.per_head(t, slab) for t in (chunks.C, chunks.B, chunks.x, y_grad))
    read, write = chunks.decays.forward_read(slab), chunks.decays.forward_write(slab)
    gate = chunks.decays.forward_gate[:, slab]
    spent = read_side(grads, q, grad, side.entering[:, slab], read, gate)
    grads.gate += spent
    grads.a += reverse_cumsum(spent * gate)
    written = write_side(grads, k, v, side.leaving_grad[:, slab], write)
    grads.dt += written * chunks.decays.forward_reach(slab)
    written = written * write
    grads.a += written.cumsum(-1) - written
    grads.a += handed_on(side, slab) * chunks.decays.forward_kept()[:, slab, :, None]


def through_backward_state(
    grads: Gradients, chunks: Chunks, slab: slice, y_grad: Tensor, side: Carried
) -> None:
    """What passes through S_R: the mirror image, over vision tokens only."""
    q, k, v, grad = (chunks.per_head(t, slab) for t in (chunks.C, chunks.B, chunks.x, y_grad))
    read, write = chunks.decays.backward_read(slab), chunks.decays.backward_write(slab)
    gate = chunks.decays.backward_gate[:, slab]
    spent = read_side(grads, q, grad, side.entering[:, slab], read, gate)
    grads.gate -= spent
    a_grad = (spent * gate).cumsum(-1)
    written = write_side(grads, k, v, side.leaving_grad[:, slab], write)
    grads.dt += written * chunks.decays.backward_reach(slab)
    written = written * write
    a_grad += reverse_cumsum(written) - written
    a_grad += handed_on(side, slab) * chunks.decays.backward_kept()[:, slab, :, None]
    grads.a += a_grad * (chunks.decays.segment[:, slab] >= 0)


def read_side(grads: Gradients, q: Tensor, grad: Tensor, state: Tensor, read: Tensor, gate: Tensor) -> Tensor:
    """Add to C̄ what its tokens read; return ȳ_i · read_i Sᵀ C_i, (B, slab, H, C), the gate left out."""
    pulled = grad @ state.mT * read[..., None]  # (B, slab, H, C, N)
    grads.C += pulled * gate[..., None]
    return (q * pulled).sum(-1)


def write_side(grads: Gradients, k: Tensor, v: Tensor, state_grad: Tensor, write: Tensor) -> Tensor:
    """Add to x̄ and B̄ what their tokens wrote; return B_jᵀ S̄ x_j, (B, slab, H, C), without the write
    weight.
    """
    grads.x += k @ state_grad * write[..., None]
    pulled = v @ state_grad.mT
    grads.B += pulled * write[..., None]
    return (k * pulled).sum(-1)


def handed_on(side: Carried, slab: slice) -> Tensor:
    """<S, S̄> of the state that passes a chunk, (B, slab, H, 1), without its decay."""
    return (side.entering[:, slab] * side.leaving_grad[:, slab]).sum((-2, -1))[..., None]
