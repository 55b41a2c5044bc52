"""The gradient of `forward.scanned`, slab by slab, with everything recomputed.

Letters as in `torch_engine`; ȳ is the gradient of y, and so on. With M = C Bᵀ, V = ȳ xᵀ, W of eq. (2) there
and T = M∘V∘(W without gates and dt):

    C̄ = (V∘W) B      B̄ = (V∘W)ᵀ C      x̄ = (M∘W)ᵀ ȳ        plus what passes through the states        (1)
    S̄_F(before) = e^{f_end} S̄_F(after) + Σ_i gF_i e^{f_i} C_i ⊗ ȳ_i       S̄_R alike, the other way      (2)
    ā_k = Σ_{i≥k>j} U_ij,  U_ij = gF_i T_ij dt_j       for the reverse direction  Σ_{i≤k<j} U_ij        (3)

Eq. (3) sums the products that span token k, all of them direct: a difference of row and column sums, which is
cheaper, loses what cancels, and a step so large that nothing spans it multiplies what is left. Writes to and
reads from the states span from the token to the chunk's edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout.segments import vision_mask
from ..operator import ScanGrads, ScanInputs, ScanOutputs
from .chunks import Chunks, Direction, Pairs, cut, matrices, pair_decays
from .decays import join_tokens, reverse_cumsum, split_tokens, unsqueeze_like
from .forward import add_skip
from .norm import norm_backward
from .states import edge_gradients, edge_states, writes


@dataclass(frozen=True)
class Gradients:
    """The gradients of all tokens, filled slab by slab."""

    x: Tensor  # (B, K, C, G, P)
    B: Tensor  # (B, K, C, G, N)
    C: Tensor  # (B, K, C, H, N)
    dt: Tensor  # (K, B, H, C), at fixed a = dt A, from inside the chunks
    gate: Tensor  # (K, B, H, C), of gF minus gR, from inside: both come from one gate; on text anything

    @classmethod
    def room_for(cls, chunks: Chunks) -> Gradients:
        """Nothing yet."""
        count, batch, heads, size, groups, state, head_dim = chunks.sizes
        tokens = ((groups, head_dim), (groups, state), (heads, state))
        scalars = (torch.zeros_like(chunks.dt) for _ in range(2))
        return cls(*(chunks.x.new_empty(batch, count, size, *each) for each in tokens), *scalars)


@dataclass(frozen=True)
class Passage:
    """What goes through one direction's decays, filled slab by slab."""

    side: Direction
    read: Tensor  # (K, B, H, C): ȳ_i · read_i Sᵀ C_i, the gate left out
    written: Tensor  # (K, B, H, C): reach_j B_jᵀ S̄ x_j, without dt
    crossing: Tensor  # (K, B, H, C): eq. (3), of the pairs on both sides of a token
    passed: Tensor  # (K, B, H): what passes the chunk

    @classmethod
    def of(cls, side: Direction) -> Passage:
        """Nothing yet; what a slab without this direction leaves out stays 0."""
        return cls(
            side, *(torch.zeros_like(side.reads) for _ in range(3)), torch.zeros_like(side.chunk_decay)
        )

    def decay_gradient(self, dt: Tensor) -> Tensor:
        """ā (K, B, H, C): eq. (3), and through the states what is read at or after a token and written before
        it, along the direction, and what passes the chunk. Sums without the token's own product are shifted
        ones: subtracting it from the whole sum would leave the rounding of a large one.
        """
        read, written = self.read * self.side.gate, self.written * dt
        if self.side.reverse:
            through = read.cumsum(-1) + F.pad(reverse_cumsum(written)[..., 1:], (0, 1))
        else:
            through = reverse_cumsum(read) + F.pad(written.cumsum(-1)[..., :-1], (1, 0))
        return self.crossing + through + self.passed[..., None]


def crossing(products: Tensor, reverse: bool) -> Tensor:
    """Eq. (3) of one direction, (K, B, H, C, C) -> (K, B, H, C).

    The inner sums are a product with ones, at row i and column k: of the columns before k, or after it. The
    rows from k on, or up to it, are what is left to sum, and there all pairs are of the direction.
    """
    ones = products.new_ones(products.shape[-2:])
    rows = ones.triu_() if reverse else ones.tril_()  # [i≤k] or [i≥k]
    return torch.matmul(products, 1 - rows).mul_(rows).sum(-2)


def backward(inputs: ScanInputs, outputs: ScanOutputs, grads: ScanOutputs) -> ScanGrads:
    """The gradients of the operator on the torch engine, each in its accumulation dtype; eqs. (1) to (3)."""
    y_grad, weight_grad = norm_backward(inputs, outputs, grads)
    x, valid, D = inputs.x, inputs.valid, inputs.D
    chunks = cut(inputs)
    y_grad = cut_gradient(y_grad, chunks, valid)  # (K, B, H, C, P)
    state_grads = [*edge_gradients(chunks, chunks.forward, y_grad, grads.final_state)][::-1]
    edges = [zip(edge_states(chunks, chunks.forward, inputs.initial_state), state_grads, strict=True)]
    if chunks.reverse is not None:
        states = reversed([*edge_states(chunks, chunks.reverse)])
        edges.append(zip(states, edge_gradients(chunks, chunks.reverse, y_grad), strict=True))
    found, passages = Gradients.room_for(chunks), [Passage.of(side) for side in chunks.directions]
    for (where, slab), *each in zip(chunks.slabs, *edges, strict=True):
        slab_gradients(found, passages, where, slab, y_grad[where], each, D)
    a_grad = decay_gradients(chunks, passages)
    dt_grad = sum((each.written for each in passages), found.dt) + a_grad * inputs.A.to(a_grad.dtype)[:, None]
    vision = vision_mask(inputs.segment, valid)
    return ScanGrads(
        x=join_tokens(found.x, x.shape[1]),
        dt=join_scalars(dt_grad, x.shape[1], valid),
        A=(a_grad * chunks.dt).sum((0, 1, 3)),
        B=join_tokens(found.B, x.shape[1]),
        C=join_tokens(found.C, x.shape[1]),
        gate=None if vision is None else gate_gradient(found, passages, x.shape[1], vision),
        D=None if D is None else skip_gradient(chunks, y_grad),
        initial_state=None if inputs.initial_state is None else state_grads[0][0],
        norm_weight=weight_grad,
    )


def cut_gradient(y_grad: Tensor, chunks: Chunks, valid: Tensor | None) -> Tensor:
    """(B, L, H, P) -> (K, B, H, C, P), 0 where masked."""
    y_grad = y_grad.to(chunks.x.dtype)
    return split_tokens(masked(y_grad, valid), chunks.C.shape[3], 0).permute(1, 0, 3, 2, 4).contiguous()


def join_scalars(tensor: Tensor, length: int, mask: Tensor | None) -> Tensor:
    """(K, B, H, C) -> (B, L, H), 0 where masked."""
    return masked(join_tokens(tensor.permute(1, 0, 3, 2), length), mask)


def masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """`tensor` (B, L, ...) where `mask`, else 0, whatever stands there."""
    return tensor if mask is None else torch.where(unsqueeze_like(mask, tensor), tensor, tensor.new_zeros(()))


def decay_gradients(chunks: Chunks, passages: list[Passage]) -> Tensor:
    """ā of both directions, (K, B, H, C)."""
    forward, *reverse = (each.decay_gradient(chunks.dt) for each in passages)
    return forward if not reverse else forward.addcmul_(reverse[0], chunks.segment >= 0)


def gate_gradient(grads: Gradients, passages: list[Passage], length: int, vision: Tensor) -> Tensor:
    """The gradient of the gate, (B, L, H)."""
    forward, reverse = (each.read for each in passages)
    return join_scalars(grads.gate + forward - reverse, length, vision)


def skip_gradient(chunks: Chunks, y_grad: Tensor) -> Tensor:
    """The gradient of D, (H,)."""
    grad = y_grad.unflatten(2, (chunks.x.shape[2], -1))  # (K, B, G, H/G, C, P)
    return torch.einsum("kbgrcp,kbgcp->gr", grad, chunks.x).flatten()


def slab_gradients(
    grads: Gradients,
    passages: list[Passage],
    where: slice,
    slab: Chunks,
    y_grad: Tensor,
    edges: list[tuple[Tensor, Tensor]],
    D: Tensor | None,
) -> None:
    """Fill in the gradients of one slab from each direction's states at its edges, and their gradients."""
    x_grad, write_grad, read_grad = inside_chunks(grads, passages, where, slab, y_grad, D)
    for side, passage, (states, state_grads) in zip(slab.directions, passages, edges, strict=False):
        entering, leaving_grad = side.entering(states), side.leaving(state_grads)
        passage.read[where] = add_read(read_grad, slab, side, y_grad, entering)
        passage.written[where] = add_written(x_grad, write_grad, slab, side, leaving_grad)
        passed = torch.einsum("kbhnp,kbhnp->kbh", entering, leaving_grad)
        passage.passed[where] = passed.mul_(side.chunk_decay)
    for room, grad in ((grads.x, x_grad), (grads.B, write_grad), (grads.C, read_grad)):
        room[:, where] = grad.permute(1, 0, 3, 2, 4)


def inside_chunks(
    grads: Gradients, passages: list[Passage], where: slice, slab: Chunks, y_grad: Tensor, D: Tensor | None
) -> tuple[Tensor, ...]:
    """Eq. (1) inside chunks: the gradients of x (K, B, G, C, P), B (K, B, G, C, N) and C (K, B, H, C, N);
    those of the scalars are filled in.
    """
    groups = slab.x.shape[:3]
    pairs, decays = Pairs.of(slab), pair_decays(slab)
    scores = slab.by_head(torch.bmm(slab.by_group(slab.C), matrices(slab.B)))  # M
    target = slab.by_head(torch.bmm(slab.by_group(y_grad), matrices(slab.x).mT))  # V
    through_decays(grads, passages, where, slab, pairs, (scores * target).mul_(decays))
    weights = decays.mul_(pairs.gates).mul_(slab.dt[..., None, :])
    scores.mul_(weights)
    add_skip(scores, D)
    score_grad = slab.by_group(target.mul_(weights))
    x_grad = torch.bmm(slab.by_group(scores).mT, slab.by_group(y_grad)).unflatten(0, groups)
    write_grad = torch.bmm(score_grad.mT, slab.by_group(slab.C)).unflatten(0, groups)
    return x_grad, write_grad, slab.by_head(torch.bmm(score_grad, matrices(slab.B).mT))


def through_decays(
    grads: Gradients,
    passages: list[Passage],
    where: slice,
    slab: Chunks,
    pairs: Pairs,
    products: Tensor,
) -> None:
    """Fill in what T of eq. (3), (K, B, H, C, C), sends to dt, the gates and the decays; T is overwritten."""
    dt = slab.dt[..., None, :]
    if pairs.side is not None:
        grads.gate[where] = (products * pairs.side).mul_(dt).sum(-1)
    grads.dt[where] = products.mul_(pairs.gates).sum(-2)
    products.mul_(dt)  # U
    for side, passage in zip(slab.directions, passages, strict=False):
        passage.crossing[where] = crossing(products, side.reverse)


def add_read(read_grad: Tensor, slab: Chunks, side: Direction, y_grad: Tensor, state: Tensor) -> Tensor:
    """Add to C̄ what its tokens read; return ȳ_i · read_i Sᵀ C_i, (K, B, H, C), the gate left out."""
    pulled = torch.bmm(matrices(y_grad), matrices(state).mT).view_as(read_grad)
    read_grad.addcmul_(side.reads[..., None], pulled)
    return pulled.mul_(slab.C).sum(-1).mul_(side.read)


def add_written(
    x_grad: Tensor, write_grad: Tensor, slab: Chunks, side: Direction, state_grad: Tensor
) -> Tensor:
    """Add to x̄ and B̄ what their tokens wrote; return reach_j B_jᵀ S̄ x_j, (K, B, H, C), without dt."""
    groups = slab.x.shape[2]
    stacked = slab.by_group(state_grad)  # (·, H/G·N, P)
    matrices(x_grad).baddbmm_(slab.by_group(writes(slab, side)).mT, stacked)
    pulled = torch.bmm(stacked, matrices(slab.x).mT)
    pulled = slab.by_head(pulled).unflatten(2, (groups, -1))  # (K, B, G, H/G, N, C)
    written = (pulled * slab.B[:, :, :, None]).sum(-2).flatten(2, 3) * side.reach
    weight = side.writes.unflatten(2, (groups, -1))
    write_grad += pulled.mul_(weight[..., None, :]).sum(3).mT
    return written
