"""Second formulations: the same mathematics written another way, to put the reference itself on trial.

Letters: B batch, L tokens, H heads, G groups, N state size, P head dim. In the dtype of the inputs, O(L²).

    y_t = Σ_s M_ts dt_s (C_t·B_s) x_s + M_t0 S₀ᵀ C_t      M_ts = exp(Σ_{s<r≤t} dt_r A) for s <= t, else 0
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCAN_KEYS = ("tyx", "txy", "yxt", "xyt")  # by layer_index % 4, most significant axis first


def selective_scan(x, dt, A, B, C, *, mask=None, initial_state=None, reverse=False) -> tuple[Tensor, Tensor]:
    """The scan as its L × L matrix."""
    if reverse:
        flipped = (tensor.flip(1) for tensor in (x, dt, B, C))
        x, dt, B, C = flipped
        mask = None if mask is None else mask.flip(1)
        y, state = selective_scan(x, dt, A, B, C, mask=mask, initial_state=initial_state)
        return y.flip(1), state
    heads, length = C.shape[2], C.shape[1]
    x, B = heads_of(x, heads), heads_of(B, heads)
    taking_part = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    dt = dt * taking_part[..., None]
    log_decay = (dt * A).cumsum(1).transpose(1, 2)  # (B, H, L): since the start
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    between = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~lower, -math.inf)
    reads = torch.einsum("bthn,bshn->bhts", C, B) * taking_part[:, None, :, None]
    weights = reads * between.exp() * dt.transpose(1, 2)[:, :, None, :]  # (B, H, t, s)
    y = torch.einsum("bhts,bshp->bthp", weights, x)
    to_end = (log_decay[..., -1:] - log_decay).exp() * dt.transpose(1, 2)  # (B, H, L)
    state = torch.einsum("bhs,bshn,bshp->bhnp", to_end, B, x)
    if initial_state is not None:
        read = torch.einsum("bthn,bhnp->bthp", C * taking_part[..., None, None], initial_state)
        y = y + log_decay.exp().transpose(1, 2)[..., None] * read
        state = state + log_decay[..., -1].exp()[..., None, None] * initial_state
    return y, state


def bidirectional_scan(
    x, dt, A, B, C, *, gate, segment=None, valid=None, D=None, initial_state=None
) -> tuple[Tensor, Tensor]:
    """Both directions as matrices; the reverse one of all segments at once, by a mask on pairs of tokens."""
    heads, length = C.shape[2], C.shape[1]
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
    segment = torch.full(x.shape[:2], -1) if segment is None else segment
    y, state = selective_scan(x, dt, A, B, C, mask=valid, initial_state=initial_state)
    vision = (segment >= 0) & valid
    pairs = (segment[:, :, None] == segment[:, None, :]) & vision[:, :, None] & vision[:, None, :]
    upper = torch.ones(length, length, dtype=torch.bool).triu()
    decay_sum = ((dt * A) * vision[..., None]).cumsum(1).transpose(1, 2)  # (B, H, L), inclusive
    before = F.pad(decay_sum, (1, 0))[..., :-1]  # exclusive: t included, s not
    between = before[:, :, None, :] - before[:, :, :, None]  # (B, H, t, s)
    between = between.masked_fill(~(pairs & upper)[:, None], -math.inf)
    reads = torch.einsum("bthn,bshn->bhts", C, heads_of(B, heads))
    weights = reads * between.exp() * dt.transpose(1, 2)[:, :, None, :]
    reverse = torch.einsum("bhts,bshp->bthp", weights, heads_of(x, heads))
    share = torch.where(vision[..., None], gate, torch.ones_like(gate))[..., None]
    y = share * y + (1 - share) * reverse
    if D is not None:
        y = y + D[:, None] * heads_of(x, heads) * valid[..., None, None]
    return y, state


def window_attention(q, k, v, window_id, *, scale=None) -> Tensor:
    """Attention over the whole row under an L × L mask."""
    heads = q.shape[2]
    inside = window_id >= 0
    allowed = (window_id[:, :, None] == window_id[:, None, :]) & inside[:, :, None]
    allowed = allowed | torch.eye(q.shape[1], dtype=torch.bool)  # a row of the softmax must not be empty
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, heads_of(k, heads), heads_of(v, heads)))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], scale=scale)
    return attended.transpose(1, 2) * inside[..., None, None]


def causal_conv(u, weight, bias=None, *, mask=None, initial_state=None) -> tuple[Tensor, Tensor]:
    """`F.conv1d` on each row's valid tokens, pushed together behind the state."""
    taps = weight.shape[1]
    outputs, states = [], []
    for row in range(u.shape[0]):
        kept = torch.arange(u.shape[1]) if mask is None else mask[row].nonzero().squeeze(-1)
        start = u.new_zeros(taps - 1, u.shape[2]) if initial_state is None else initial_state[row]
        sequence = torch.cat([start, u[row, kept]])  # (K - 1 + n, channels)
        states.append(sequence[len(sequence) - (taps - 1) :])
        out = torch.zeros_like(u[row])
        if len(kept):
            mixed = F.conv1d(sequence.T[None], weight[:, None], bias, groups=u.shape[2])[0].T
            out = out.index_copy(0, kept, mixed)
        outputs.append(out)
    return torch.stack(outputs), torch.stack(states)


def heads_of(tensor: Tensor, heads: int) -> Tensor:
    """(B, L, G, ·) -> (B, L, H, ·) by indexing: head h reads group h // (H / G)."""
    ratio = heads // tensor.shape[2]
    return tensor[:, :, [head // ratio for head in range(heads)]]


def scan_order(coords: Tensor, layer_index: int) -> Tensor:
    """Sort plain tuples, row by row and segment by segment."""
    columns = {"t": 1, "y": 2, "x": 3}
    key = [columns[axis] for axis in SCAN_KEYS[layer_index % 4]]
    rows = []
    for row in coords.tolist():
        order = list(range(len(row)))
        for segment in {cell[0] for cell in row} - {-1}:
            tokens = [i for i, cell in enumerate(row) if cell[0] == segment]
            by_key = sorted(tokens, key=lambda i: [row[i][column] for column in key])
            for position, token in zip(tokens, by_key, strict=True):
                order[position] = token
        rows.append(order)
    return torch.tensor(rows)


def same_window(coords: Tensor, window_thw: tuple[int, int, int], shifted: bool) -> Tensor:
    """(B, L, L) bool: the definition of a window, asked of every pair of tokens."""
    segment, cells = coords[..., 0], coords[..., 1:]
    mates = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, :, None]
    last = torch.where(mates[..., None], cells[:, None], -1).amax(2)  # (B, L, 3), of the token's segment
    first = torch.where(mates[..., None], cells[:, None], 2**62).amin(2)
    extent = last - first + 1
    size = torch.tensor(window_thw)
    shift = torch.where((extent > size) & torch.tensor(shifted), size // 2, 0)
    number = torch.div(cells + shift, size, rounding_mode="floor")
    return mates & (number[:, :, None] == number[:, None, :]).all(-1)


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance over mean squared size, token by token in plain Python."""
    tokens = counted(student, mask)
    distance = sum(((student[i] - teacher[i]) ** 2).sum() for i in tokens) / len(tokens)
    size = sum((teacher[i] ** 2).sum() for i in tokens) / len(tokens)
    return distance / size


def logit_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """`torch.distributions` Kullback-Leibler divergence, token by token."""
    tokens = counted(student, mask)
    total = student.new_zeros(())
    for i in tokens:
        p, q = (torch.distributions.Categorical(logits=z[i] / temperature) for z in (teacher, student))
        total = total + torch.distributions.kl_divergence(p, q)
    return temperature**2 * total / len(tokens)


def counted(tensor: Tensor, mask: Tensor | None) -> list[tuple[int, int]]:
    """(row, position) of every token that counts."""
    batch, length = tensor.shape[:2]
    pairs = [(row, t) for row in range(batch) for t in range(length)]
    return [pair for pair in pairs if mask is None or mask[pair]]
