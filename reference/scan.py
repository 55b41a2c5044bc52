"""The selective scan: one direction, both directions, and one token of decoding.

Letters: B batch, L tokens, H query heads, G groups, N state size, P head dim. Head h reads group h // (H/G)
of x and B, as attention's query heads read key/value heads.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t ⊗ x_t                     the state, (N, P) per head           (1)
    y_t = S_tᵀ C_t                                                                                      (2)
    y_f = (1), (2) over all tokens, left to right
    y_r = (1), (2) over the tokens of one segment, right to left, with S_{t+1} for S_{t-1}              (3)
    y   = gate · y_f + (1 - gate) · y_r + D x   on vision,         y = y_f + D x   on text              (4)

Several samples may share a row: where one begins the state is zeros, so a row equals its samples alone.
Choice: a state given belongs to the sample that is scanned first, and the state returned is that of the last.
Whoever cuts a row where a sample ends goes on without a state.

(1) and (2) are Mamba2's recurrence (arXiv 2405.21060) with its names x, dt, A, B, C, D; (3) and (4) are
Flex-MA's (LinMU, arXiv 2601.01322). Cost: L steps of a few small torch calls each, and autograd keeps every
state: O(L·H·N·P) memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    require,
    require_float,
    require_groups,
    require_int64,
    require_mask,
    require_one_device,
    require_shape,
)
from .numerics import (
    accumulation_dtype,
    begins_sample,
    repeat_groups,
    without_autocast,
    zero_where_masked,
)


@without_autocast
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan the sequence once, left to right or right to left; eqs. (1) and (2) (Mamba2, arXiv 2405.21060).

    Args:
        x: (B, L, G, P) input, any float dtype.
        dt: (B, L, H) step size, > 0 (softplus already applied).
        A: (H,) decay rate per unit of dt, < 0.
        B: (B, L, G, N) write direction.
        C: (B, L, H, N) read direction.
        mask: (B, L) bool, None = all True; False = skipped: state unchanged, y = 0, no gradient.
        initial_state: (B, H, N, P), S before the first token; zeros if None.
        reverse: run right to left.
        sequence: (B, L) int64, which sample of a packed row a token belongs to; the tokens of one follow each
            other, and nothing crosses from one to the next. The ids of masked tokens say nothing. None = one
            a row.
    Returns:
        y: (B, L, H, P) in the dtype of `x`.
        final_state: (B, H, N, P) in float32, or float64 if `x` is.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or L = 0.
    """
    check_scan("selective_scan", x, dt, A, B, C, mask=mask, initial_state=initial_state, sequence=sequence)
    heads, dtype = C.shape[2], x.dtype
    accumulate = accumulation_dtype(dtype)
    x, dt, A, B, C = (tensor.to(accumulate) for tensor in (x, dt, A, B, C))
    if mask is not None:  # dt = 0 is the exact identity: decay exp(0) = 1, write 0
        x, B, C = (zero_where_masked(tensor, mask[:, :, None, None]) for tensor in (x, B, C))
        dt = zero_where_masked(dt, mask[:, :, None])
    x, B = repeat_groups(x, heads), repeat_groups(B, heads)  # (B, L, H, P), (B, L, H, N)
    state = initial_scan_state(x, B) if initial_state is None else initial_state.to(accumulate)
    tokens = list(zip(*(tensor.unbind(1) for tensor in (x, dt, B, C)), strict=True))
    begins = sample_begins(sequence, mask, reverse, len(tokens))
    outputs: list[Tensor] = []
    for token, fresh in zip(
        *((reversed(tokens), reversed(begins)) if reverse else (tokens, begins)), strict=True
    ):
        if fresh is not None:
            state = zero_where_masked(state, ~fresh[:, None, None, None])
        state, y_t = advance(state, A, *token)
        outputs.append(y_t)
    y = torch.stack(outputs[::-1] if reverse else outputs, dim=1)  # (B, L, H, P)
    return y.to(dtype), state


def sample_begins(
    sequence: Tensor | None, mask: Tensor | None, reverse: bool, length: int
) -> list[Tensor | None]:
    """(B,) bool for each token: whether a sample begins there, in the scan's direction; None = never."""
    if sequence is None:
        return [None] * length
    if reverse:
        mask = None if mask is None else mask.flip(1)
        return list(begins_sample(sequence.flip(1), mask).flip(1).unbind(1))
    return list(begins_sample(sequence, mask).unbind(1))


def advance(state: Tensor, A: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One token: state (B, H, N, P), x (B, H, P), dt (B, H), B and C (B, H, N) -> (state, y (B, H, P))."""
    decay = torch.exp(dt * A)  # (B, H)
    write = (dt[..., None] * B)[..., :, None] * x[..., None, :]  # (B, H, N, P)
    state = decay[..., None, None] * state + write  # eq. (1)
    y = (C[..., None, :] @ state).squeeze(-2)  # eq. (2), (B, H, P)
    return state, y


@without_autocast
def bidirectional_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    gate: Tensor,
    segment: Tensor | None = None,
    valid: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan all tokens left to right, each segment right to left too; eq. (4) (LinMU, arXiv 2601.01322).

    Choice: the reverse scan starts from zero in every segment. The alternative, one state across segments,
    would let text between two images see the second, and prefill in chunks would differ from prefill in one
    piece.

    Args:
        x, dt, A, B, C: as for `selective_scan`, already in scan order.
        gate: (B, L, H) in [0, 1], share of y_f on vision tokens; unused on text.
        segment: (B, L) int64, segment id of each position, -1 on text; None = all text.
        valid: (B, L) bool, True = not padding; None = all valid.
        D: (H,) skip weight of x; None = no skip.
        initial_state: (B, H, N, P) of the left-to-right direction; zeros if None.
        sequence: (B, L) int64, which sample of a packed row a token belongs to; the tokens of one follow each
            other, and nothing crosses from one to the next. The ids of invalid tokens say nothing. None = one
            a row.
    Returns:
        y: (B, L, H, P) in the dtype of `x`, 0 on padding.
        final_state: (B, H, N, P) of the left-to-right direction, float32, or float64 if `x` is.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or L = 0.
    """
    where = "bidirectional_scan"
    given = {"mask": valid, "initial_state": initial_state, "sequence": sequence}
    check_scan(where, x, dt, A, B, C, mask_name="valid", **given)
    check_bidirectional(where, C, gate, segment, D)
    dtype = x.dtype
    x, gate = x.to(accumulation_dtype(dtype)), gate.to(accumulation_dtype(dtype))
    if valid is not None:
        x, gate = zero_where_masked(x, valid[..., None, None]), zero_where_masked(gate, valid[..., None])
    y_f, final_state = selective_scan(x, dt, A, B, C, **given)
    y = y_f  # (B, L, H, P)
    if segment is not None:
        is_vision = segment >= 0 if valid is None else (segment >= 0) & valid
        y_r = reverse_scan(x, dt, A, B, C, segment, is_vision, sequence)
        gate = gate[..., None]  # (B, L, H, 1)
        y = torch.where(is_vision[..., None, None], gate * y_f + (1 - gate) * y_r, y_f)  # eq. (4)
    return add_skip(y, x, D).to(dtype), final_state


def reverse_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    segment: Tensor,
    is_vision: Tensor,
    sequence: Tensor | None = None,
) -> Tensor:
    """y_r of eq. (3), (B, L, H, P): each segment alone, right to left, from a zero state; 0 on text."""
    batch, length, heads, _ = C.shape
    total = x.new_zeros(batch, length, heads, x.shape[3])
    for segment_id in segment[is_vision].unique().tolist():
        mask = (segment == segment_id) & is_vision
        columns = mask.any(0).nonzero().squeeze(-1)
        span = slice(int(columns[0]), int(columns[-1]) + 1)  # text in it is masked
        inside = (x[:, span], dt[:, span], A, B[:, span], C[:, span])
        samples = None if sequence is None else sequence[:, span]
        y_r, _ = selective_scan(*inside, mask=mask[:, span], reverse=True, sequence=samples)  # eq. (3)
        total = total + F.pad(y_r, (0, 0, 0, 0, span.start, length - span.stop))
    return total


def add_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """y + D x: y (B, L, H, P), x (B, L, G, P), D (H,) or None = no skip -> (B, L, H, P)."""
    if D is None:
        return y
    return y + D.to(y.dtype)[:, None] * repeat_groups(x, y.shape[2])  # eq. (4)


@without_autocast
def scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One text token of decoding: eqs. (1) and (2), and the skip of eq. (4) (Mamba2, arXiv 2405.21060).

    Args:
        state: (B, H, N, P), float32, or float64 if `x` is.
        x: (B, G, P); dt: (B, H), > 0; A: (H,), < 0; B: (B, G, N); C: (B, H, N): as for `selective_scan`.
        D: (H,) skip weight of x; None = no skip.
        valid: (B,) bool, True = takes part; other rows keep their state and give 0. None = all.
    Returns:
        y: (B, H, P) in the dtype of `x`.
        state: (B, H, N, P), the new state; the argument is left as it was.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    check_step("scan_step", state, x, dt, A, B, C, D, valid)
    dtype = x.dtype
    x = x.to(accumulation_dtype(dtype))
    x, dt, B, C = (tensor.unsqueeze(1) for tensor in (x, dt, B, C))  # L = 1
    mask = None if valid is None else valid[:, None]
    if mask is not None:
        x = zero_where_masked(x, mask[..., None, None])
    y, state = selective_scan(x, dt, A, B, C, mask=mask, initial_state=state)
    return add_skip(y, x, D)[:, 0].to(dtype), state


def initial_scan_state(x: Tensor, B: Tensor) -> Tensor:
    """Zeros (B, H, N, P) for x (B, L, H, P) and B (B, L, H, N)."""
    return x.new_zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3])


def check_scan(
    where: str, x, dt, A, B, C, *, mask, initial_state, sequence=None, mask_name: str = "mask"
) -> None:
    """Shapes, dtypes and devices of the scan's arguments."""
    require_float(where, x=x, dt=dt, A=A, B=B, C=C, initial_state=initial_state)
    require_shape(where, "x", x, (None, None, None, None), "B, L, G, P")
    batch, length, groups, head_dim = x.shape
    require(length >= 1, where, "L must be at least 1", length)
    require_shape(where, "C", C, (batch, length, None, None), "B, L, H, N")
    heads, state = C.shape[2:]
    require_groups(where, heads, groups)
    require_shape(where, "dt", dt, (batch, length, heads), "B, L, H")
    require_shape(where, "A", A, (heads,), "H")
    require_shape(where, "B", B, (batch, length, groups, state), "B, L, G, N")
    require_mask(where, mask_name, mask, (batch, length), "B, L")
    if initial_state is not None:
        require_shape(where, "initial_state", initial_state, (batch, heads, state, head_dim), "B, H, N, P")
    require_int64(where, "sequence", sequence, (batch, length), "B, L")
    require_one_device(where, x=x, **{mask_name: mask}, sequence=sequence)


def check_bidirectional(where: str, C: Tensor, gate, segment, D) -> None:
    """Shapes, dtypes and devices of what `bidirectional_scan` adds to the scan."""
    batch, length, heads, _ = C.shape
    require_float(where, C=C, gate=gate, D=D)
    require_shape(where, "gate", gate, (batch, length, heads), "B, L, H")
    require_int64(where, "segment", segment, (batch, length), "B, L")
    require_one_device(where, C=C, segment=segment)
    if D is not None:
        require_shape(where, "D", D, (heads,), "H")


def check_step(where: str, state, x, dt, A, B, C, D, valid) -> None:
    """Shapes, dtypes and devices of one token's arguments."""
    require_float(where, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D)
    require_shape(where, "x", x, (None, None, None), "B, G, P")
    batch, groups, head_dim = x.shape
    require_shape(where, "C", C, (batch, None, None), "B, H, N")
    heads, size = C.shape[1:]
    require_groups(where, heads, groups)
    require_shape(where, "dt", dt, (batch, heads), "B, H")
    require_shape(where, "A", A, (heads,), "H")
    require_shape(where, "B", B, (batch, groups, size), "B, G, N")
    require_shape(where, "state", state, (batch, heads, size, head_dim), "B, H, N, P")
    if D is not None:
        require_shape(where, "D", D, (heads,), "H")
    require_mask(where, "valid", valid, (batch,), "B")
    require_one_device(where, x=x, valid=valid)
