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
import torch.nn.functional as F
from torch import Tensor

from .precision import accumulation_dtype, without_autocast
from .scan_masks import next_segment, vision_mask

CHUNK = 64
SLAB_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of one (C, C) score matrix per chunk and head


@dataclass(frozen=True)
class Chunks:
    """The inputs in the accumulation dtype, cut into K chunks: tokens (B, K, C, ·), per-head scalars (B, K,
    H, C).
    """

    x: Tensor  # (B, K, C, G, P)
    B: Tensor  # (B, K, C, G, N)
    C: Tensor  # (B, K, C, H, N)
    dt: Tensor  # (B, K, H, C), 0 where masked
    A: Tensor  # (H,)
    forward_sum: Tensor  # f of eq. (1)
    backward_sum: Tensor | None  # b of eq. (1); None = no vision at all
    backward_total: Tensor | None  # b_end, (B, K, H, 1)
    forward_gate: Tensor  # gF
    backward_gate: Tensor | None  # gB
    segment: Tensor | None  # (B, K, 1, C)
    opens: (
        Tensor | None
    )  # (B, K+1): segment of the first vision token at or after each chunk's start, else -1

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

    def forward_write(self, slab: slice) -> Tensor:
        """e^{f_end - f_j} dt_j of eq. (4), (B, slab, H, C, 1)."""
        return (forward_reach(self, slab) * self.dt[:, slab])[..., None]

    def backward_write(self, slab: slice) -> Tensor:
        """e^{b_j} dt_j of eq. (5), 0 outside the segment that leaves at its start, (B, slab, H, C, 1)."""
        return (backward_reach(self, slab) * self.dt[:, slab])[..., None]

    def forward_read(self, slab: slice) -> Tensor:
        """e^{f_i} of eq. (3), without the gate, (B, slab, H, C, 1)."""
        return self.forward_sum[:, slab].exp()[..., None]

    def backward_read(self, slab: slice) -> Tensor:
        """e^{b_end - b_i} of eq. (3), without the gate, 0 outside the segment entering at its end."""
        reads = self.segment[:, slab] == self.opens[:, 1:][:, slab, None, None]
        decay = (self.backward_total[:, slab] - self.backward_sum[:, slab]).clamp_max(0).exp()
        return (decay * reads)[..., None]


def forward_reach(chunks: Chunks, slab: slice) -> Tensor:
    """e^{f_end - f_j}: what is left of token j's write at the end of its chunk, (B, slab, H, C)."""
    total = chunks.forward_sum[:, slab, :, -1:]
    return (total - chunks.forward_sum[:, slab]).clamp_max(0).exp()


def backward_reach(chunks: Chunks, slab: slice) -> Tensor:
    """e^{b_j}: what is left of token j's write at the start of its chunk, (B, slab, H, C)."""
    writes = chunks.segment[:, slab] == chunks.opens[:, :-1][:, slab, None, None]
    return chunks.backward_sum[:, slab].exp() * writes


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
    """Mask, pad with masked tokens and cut into chunks; eq. (1)."""
    accumulate = accumulation_dtype(x.dtype)
    length = x.shape[1]
    chunk = CHUNK if length > CHUNK else length
    vision = vision_mask(segment, valid)

    def tokens(tensor: Tensor, mask: Tensor | None = None, fill: float = 0) -> Tensor:
        tensor = tensor.to(accumulate)
        if mask is not None:
            tensor = torch.where(unsqueeze_like(mask, tensor), tensor, tensor.new_tensor(fill))
        return split_tokens(tensor, chunk, fill)

    def scalars(tensor: Tensor, mask: Tensor | None = None, fill: float = 0) -> Tensor:
        return tokens(tensor, mask, fill).transpose(2, 3).contiguous()

    dt_chunks, A = scalars(dt, valid), A.to(accumulate)
    step = dt_chunks * A[:, None]  # (B, K, H, C)
    directions = dict.fromkeys(("backward_sum", "backward_total", "backward_gate", "segment", "opens"))
    forward_gate = torch.ones_like(step[:, :, :, :1])
    if vision is not None:
        is_vision = split_tokens(vision, chunk, False)[:, :, None]  # (B, K, 1, C)
        inclusive = (step * is_vision).cumsum(-1)
        forward_gate = scalars(gate, vision, fill=1)
        directions = {
            "backward_sum": F.pad(inclusive[..., :-1], (1, 0)),
            "backward_total": inclusive[..., -1:],
            "backward_gate": (1 - forward_gate) * is_vision,
            "segment": split_tokens(torch.where(vision, segment, -1), chunk, -1)[:, :, None],
            "opens": next_segment(segment, vision, chunk),
        }
    return Chunks(
        x=tokens(x, valid),
        B=tokens(B, valid),
        C=tokens(C, valid),
        dt=dt_chunks,
        A=A,
        forward_sum=step.cumsum(-1),
        forward_gate=forward_gate,
        **directions,
    )


def split_tokens(tensor: Tensor, chunk: int, fill: float) -> Tensor:
    """(B, L, ...) -> (B, K, C, ...), the last chunk padded with `fill`."""
    missing = -tensor.shape[1] % chunk
    if missing:
        tail = tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), fill)
        tensor = torch.cat([tensor, tail], dim=1)
    return tensor.unflatten(1, (-1, chunk))


def join_tokens(tensor: Tensor, length: int) -> Tensor:
    """(B, K, C, ...) -> (B, L, ...): the inverse of `split_tokens`."""
    return tensor.flatten(1, 2)[:, :length]


def unsqueeze_like(mask: Tensor, tensor: Tensor) -> Tensor:
    """(B, L) -> (B, L, 1, ...) with the axes of `tensor`."""
    return mask.reshape(*mask.shape, *(1,) * (tensor.ndim - 2))


def decay_matrix(chunks: Chunks, slab: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exponentials of eq. (2), (B, slab, H, C, C), and where the two directions use them, (C, C) and
    (B, slab, 1, C, C).
    """
    forward = chunks.forward_sum[:, slab]
    size = forward.shape[-1]
    before = torch.ones(size, size, dtype=torch.bool, device=forward.device).tril()  # j ≤ i
    exponent = forward[..., :, None] - forward[..., None, :]
    if chunks.segment is None:
        return exponent.clamp_max_(0).exp_().mul_(before), before, None
    backward, segment = chunks.backward_sum[:, slab], chunks.segment[:, slab]
    exponent = torch.where(before, exponent, backward[..., None, :] - backward[..., :, None])
    together = (segment[..., :, None] == segment[..., None, :]) & before.T
    return exponent.clamp_max_(0).exp_(), before, together


def gates(chunks: Chunks, slab: slice, before: Tensor, together: Tensor | None) -> Tensor:
    """gF_i [j≤i] + gB_i [j≥i, one segment] of eq. (2), (B, slab, H, C, C)."""
    weight = chunks.forward_gate[:, slab, :, :, None] * before
    if together is None:
        return weight
    return weight.addcmul_(chunks.backward_gate[:, slab, :, :, None], together.to(weight.dtype))


def forward_states(chunks: Chunks, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eq. (4): the state before every chunk, (B, K, H, N, P), and the one after the last, (B, H, N, P)."""
    states = local_states(chunks, chunks.forward_write)
    decay = chunks.forward_sum[..., -1].exp()  # (B, K, H)
    return carry(states, decay, initial_state)


def backward_states(chunks: Chunks) -> Tensor:
    """Eq. (5): the state after every chunk, (B, K, H, N, P)."""
    states = local_states(chunks, chunks.backward_write)
    return carry(states, carried_over(chunks), None, reverse=True)[0]


def carried_over(chunks: Chunks) -> Tensor:
    """Factor of S_R in eq. (5), (B, K, H): 0 where another segment opens inside the chunk."""
    same = chunks.opens[:, 1:] == chunks.opens[:, :-1]
    return chunks.backward_total[..., 0].exp() * same[..., None]


def local_states(chunks: Chunks, write) -> Tensor:
    """Σ_j write_j B_j ⊗ x_j of every chunk, (B, K, H, N, P)."""
    batch, count = chunks.x.shape[:2]
    sizes = (chunks.heads, chunks.B.shape[-1], chunks.x.shape[-1])
    states = chunks.x.new_empty(batch, count, *sizes)
    for slab in chunks.slabs:
        B, x = chunks.per_head(chunks.B, slab), chunks.per_head(chunks.x, slab)
        states[:, slab] = (B * write(slab)).mT @ x
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
    forward_state, final_state = forward_states(chunks, initial_state)
    backward_state = None if chunks.segment is None else backward_states(chunks)
    outputs = []
    for slab in chunks.slabs:
        q, k, v = (chunks.per_head(tensor, slab) for tensor in (chunks.C, chunks.B, chunks.x))
        decay, before, together = decay_matrix(chunks, slab)
        weights = decay.mul_(gates(chunks, slab, before, together)).mul_(chunks.dt[:, slab, :, None])
        y = (q @ k.mT).mul_(weights) @ v  # (B, slab, H, C, P)
        read = chunks.forward_read(slab) * chunks.forward_gate[:, slab, ..., None]
        y += (q * read) @ forward_state[:, slab]
        if backward_state is not None:
            read = chunks.backward_read(slab) * chunks.backward_gate[:, slab, ..., None]
            y += (q * read) @ backward_state[:, slab]
        if D is not None:
            y += v * D.to(v.dtype)[:, None, None]
        outputs.append(y.transpose(2, 3).to(x.dtype))  # (B, slab, C, H, P)
    return join_tokens(torch.cat(outputs, dim=1), x.shape[1]).contiguous(), final_state
