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
processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import accumulation_dtype, without_autocast
from .scan_decays import Decays, cut_tokens, join_tokens, scan_decays

CHUNK = 64
SLAB_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of one (C, C) score matrix per chunk and head


@dataclass(frozen=True)
class Chunks:
    """The tokens in the accumulation dtype, cut into K chunks, and their scalars."""

    x: Tensor  # (B, K, C, G, P)
    B: Tensor  # (B, K, C, G, N)
    C: Tensor  # (B, K, C, H, N)
    decays: Decays

    @property
    def heads(self) -> int:
        return self.C.shape[3]

    @property
    def slabs(self) -> Iterator[slice]:
        """Runs of chunks whose score matrices fit the slab."""
        batch, chunks, chunk = self.C.shape[:3]
        per_chunk = batch * self.heads * chunk * chunk
        step = max(1, SLAB_ELEMENTS.get(self.C.device.type, 2**20) // per_chunk)
        return (slice(start, min(start + step, chunks)) for start in range(0, chunks, step))

    def per_head(self, tensor: Tensor, slab: slice) -> Tensor:
        """(B, K, C, H or G, ·) -> (B, slab, H, C, ·), groups repeated."""
        part = tensor[:, slab].transpose(2, 3)
        return part.repeat_interleave(self.heads // part.shape[2], dim=2)


def cut(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    gate: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
) -> Chunks:
    """Mask, pad with masked tokens and cut into chunks."""
    dtype, chunk = accumulation_dtype(x.dtype), min(CHUNK, x.shape[1])
    tokens = (cut_tokens(tensor, valid, chunk, dtype) for tensor in (x, B, C))
    return Chunks(*tokens, scan_decays(dt, A, gate, segment, valid, chunk, dtype, torch.float64))


def decay_matrix(decays: Decays, slab: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exponentials of eq. (2), (B, slab, H, C, C), and where the two directions use them, (C, C) and
    (B, slab, 1, C, C).
    """
    forward = decays.forward_sum[:, slab]
    size = forward.shape[-1]
    before = torch.ones(size, size, dtype=torch.bool, device=forward.device).tril()  # j ≤ i
    exponent = forward[..., :, None] - forward[..., None, :]
    if decays.segment is None:
        return decays.exp(exponent).mul_(before), before, None
    backward, segment = decays.backward_sum[:, slab], decays.segment[:, slab]
    exponent = torch.where(before, exponent, backward[..., None, :] - backward[..., :, None])
    together = (segment[..., :, None] == segment[..., None, :]) & before.T
    return decays.exp(exponent), before, together


def gates(decays: Decays, slab: slice, before: Tensor, together: Tensor | None) -> Tensor:
    """gF_i [j≤i] + gB_i [j≥i, one segment] of eq. (2), (B, slab, H, C, C)."""
    weight = decays.forward_gate[:, slab, :, :, None] * before
    if together is None:
        return weight
    return weight.addcmul_(decays.backward_gate[:, slab, :, :, None], together.to(weight.dtype))


def forward_states(chunks: Chunks, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eq. (4): the state before every chunk, (B, K, H, N, P), and the one after the last, (B, H, N, P)."""
    states = local_states(chunks, chunks.decays.forward_write)
    return carry(states, chunks.decays.forward_kept(), initial_state)


def backward_states(chunks: Chunks) -> Tensor:
    """Eq. (5): the state after every chunk, (B, K, H, N, P)."""
    states = local_states(chunks, chunks.decays.backward_write)
    return carry(states, chunks.decays.backward_kept(), None, reverse=True)[0]


def local_states(chunks: Chunks, write) -> Tensor:
    """Σ_j write_j B_j ⊗ x_j of every chunk, (B, K, H, N, P)."""
    batch, count = chunks.x.shape[:2]
    sizes = (chunks.heads, chunks.B.shape[-1], chunks.x.shape[-1])
    states = chunks.x.new_empty(batch, count, *sizes)
    for slab in chunks.slabs:
        B, x = chunks.per_head(chunks.B, slab), chunks.per_head(chunks.x, slab)
        states[:, slab] = (B * write(slab)[..., None]).mT @ x
    return states


def carry(
    local: Tensor, decay: Tensor, start: Tensor | None, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Run `s ← decay_k s + local_k` over chunks, in place.

    Args:
        local: (B, K, H, N, P), overwritten.
        decay: (B, K, H).
        start: (B, H, N, P); zeros if None.
        reverse: from the last chunk to the first.
    Returns:
        (B, K, H, N, P), what each chunk receives, and (B, H, N, P), what the last one leaves.
    """
    state = torch.zeros_like(local[:, 0]) if start is None else start.to(local.dtype).clone()
    count = local.shape[1]
    decay = decay[..., None, None]
    for k in reversed(range(count)) if reverse else range(count):
        following = torch.addcmul(local[:, k], decay[:, k], state)
        local[:, k] = state
        state = following
    return local, state


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
    decays = chunks.decays
    forward_state, final_state = forward_states(chunks, initial_state)
    backward_state = None if decays.segment is None else backward_states(chunks)
    outputs = []
    for slab in chunks.slabs:
        q, k, v = (chunks.per_head(tensor, slab) for tensor in (chunks.C, chunks.B, chunks.x))
        decay, before, together = decay_matrix(decays, slab)
        weights = decay.mul_(gates(decays, slab, before, together)).mul_(decays.dt[:, slab, :, None])
        y = (q @ k.mT).mul_(weights) @ v  # (B, slab, H, C, P)
        read = decays.forward_read(slab) * decays.forward_gate[:, slab]
        y += (q * read[..., None]) @ forward_state[:, slab]
        if backward_state is not None:
            read = decays.backward_read(slab) * decays.backward_gate[:, slab]
            y += (q * read[..., None]) @ backward_state[:, slab]
        if D is not None:
            y += v * D.to(v.dtype)[:, None, None]
        outputs.append(y.transpose(2, 3).to(x.dtype))  # (B, slab, C, H, P)
    return join_tokens(torch.cat(outputs, dim=1), x.shape[1]).contiguous(), final_state
