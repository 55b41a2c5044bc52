# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for window attention: tokens gathered window by window, forward, ∂q, and ∂k with ∂v.

Letters and equations as in `batched_windows`. Tokens are sorted by row and window id; a program takes a block
of the sorted tokens and walks over those of all windows that the block touches, so windows may have any sizes
and nothing waits for the device. Scores live in powers of two: lse is log2 of softmax's denominator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launching
from .scan_output import stride_arguments
from .scan_states import precision, rows_of, tile_size

LOG2_E = 1.4426950408889634


@triton.jit
def block_of_tokens(TOKEN, WINDOW, FIRST, LAST, count, place):
    """A block of sorted tokens: (token, window, taken), and the span of sorted tokens that its windows
    cover."""
    inside = place < count
    token = tl.load(TOKEN + place, mask=inside, other=0)
    window = tl.load(WINDOW + place, mask=inside, other=-1)
    taken = inside & (window >= 0)
    low = tl.min(tl.where(taken, tl.load(FIRST + place, mask=inside, other=0), count), 0)
    high = tl.max(tl.where(taken, tl.load(LAST + place, mask=inside, other=0), 0), 0)
    return token, window, taken, low, high


@triton.jit
def rows_at(base, token, length, batch_stride, token_stride, columns, taken, SIZE: tl.constexpr):
    """Tiles of one head at tokens of the flattened (B, L)."""
    where = taken[:, None] & (columns < SIZE)[None, :]
    offset = (token // length) * batch_stride + (token % length) * token_stride
    return tl.load(base + offset[:, None] + columns[None, :], mask=where, other=0.0)


@triton.jit
def attend_kernel(
    Q,
    K,
    V,
    TOKEN,
    WINDOW,
    FIRST,
    LAST,
    OUT,
    LSE,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    length,
    count,
    scale,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eq. (1): `attend` of the reference for a block of tokens of one head."""
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    place = tl.cast(tl.program_id(0) // HEADS, tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_n = tl.arange(0, BLOCK_N)
    columns_p = tl.arange(0, BLOCK_P)
    token, window, taken, low, high = block_of_tokens(TOKEN, WINDOW, FIRST, LAST, count, place)
    q = rows_at(Q + head * q_head, token, length, q_batch, q_token, columns_n, taken, N)
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_P], tl.float32)
    for start in range(low, high, COLUMNS):
        other = start + tl.arange(0, COLUMNS)
        seen = other < high
        other_token = tl.load(TOKEN + other, mask=seen, other=0)
        other_window = tl.load(WINDOW + other, mask=seen, other=-2)
        seen = seen & (other_window >= 0)  # between two rows lie tokens of no window
        k = rows_at(K + head // RATIO * k_head, other_token, length, k_batch, k_token, columns_n, seen, N)
        v = rows_at(V + head // RATIO * v_head, other_token, length, v_batch, v_token, columns_p, seen, P)
        together = window[:, None] == other_window[None, :]
        scores = tl.where(together, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, -1e30)
        highest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.where(together, tl.exp2(scores - highest[:, None]), 0.0)
        shrink = tl.exp2(largest - highest)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        largest = highest
    total = tl.where(taken, total, 1.0)
    at = token * HEADS + head
    real = place < count
    out = tl.where(taken[:, None], out / total[:, None], 0.0)
    where = real[:, None] & (columns_p < P)[None, :]
    tl.store(OUT + at[:, None] * P + columns_p[None, :], out.to(OUT.dtype.element_ty), mask=where)
    tl.store(LSE + at, tl.where(taken, largest + tl.log2(total), 0.0), mask=real)


@triton.jit
def query_gradient_kernel(
    Q,
    K,
    V,
    O_GRAD,
    TOKEN,
    WINDOW,
    FIRST,
    LAST,
    LSE,
    DELTA,
    Q_GRAD,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    g_batch,
    g_token,
    g_head,
    length,
    count,
    scale,
    natural_scale,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eq. (2), q̄, for a block of tokens of one head."""
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    place = tl.cast(tl.program_id(0) // HEADS, tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_n = tl.arange(0, BLOCK_N)
    columns_p = tl.arange(0, BLOCK_P)
    token, window, taken, low, high = block_of_tokens(TOKEN, WINDOW, FIRST, LAST, count, place)
    q = rows_at(Q + head * q_head, token, length, q_batch, q_token, columns_n, taken, N)
    grad = rows_at(O_GRAD + head * g_head, token, length, g_batch, g_token, columns_p, taken, P)
    at = token * HEADS + head
    lse = tl.load(LSE + at, mask=taken, other=0.0)
    delta = tl.load(DELTA + at, mask=taken, other=0.0)
    q_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(low, high, COLUMNS):
        other = start + tl.arange(0, COLUMNS)
        seen = other < high
        other_token = tl.load(TOKEN + other, mask=seen, other=0)
        other_window = tl.load(WINDOW + other, mask=seen, other=-2)
        seen = seen & (other_window >= 0)  # between two rows lie tokens of no window
        k = rows_at(K + head // RATIO * k_head, other_token, length, k_batch, k_token, columns_n, seen, N)
        v = rows_at(V + head // RATIO * v_head, other_token, length, v_batch, v_token, columns_p, seen, P)
        together = window[:, None] == other_window[None, :]
        exponent = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None]
        weights = tl.where(together, tl.exp2(tl.minimum(exponent, 0.0)), 0.0)
        target = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        q_grad = tl.dot((weights * target).to(k.dtype), k, q_grad, input_precision=PRECISION)
    where = (place < count)[:, None] & (columns_n < N)[None, :]
    q_grad = q_grad * natural_scale
    tl.store(Q_GRAD + at[:, None] * N + columns_n[None, :], q_grad.to(Q_GRAD.dtype.element_ty), mask=where)


@triton.jit
def key_gradient_kernel(
    Q,
    K,
    V,
    O_GRAD,
    TOKEN,
    WINDOW,
    FIRST,
    LAST,
    LSE,
    DELTA,
    K_GRAD,
    V_GRAD,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    g_batch,
    g_token,
    g_head,
    length,
    count,
    scale,
    natural_scale,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eq. (2), k̄ and v̄, for a block of tokens of one group: it loops over the group's heads, adding
    nothing atomically."""
    groups = HEADS // RATIO
    group = tl.cast(tl.program_id(0) % groups, tl.int64)
    place = tl.cast(tl.program_id(0) // groups, tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_n = tl.arange(0, BLOCK_N)
    columns_p = tl.arange(0, BLOCK_P)
    token, window, taken, low, high = block_of_tokens(TOKEN, WINDOW, FIRST, LAST, count, place)
    k = rows_at(K + group * k_head, token, length, k_batch, k_token, columns_n, taken, N)
    v = rows_at(V + group * v_head, token, length, v_batch, v_token, columns_p, taken, P)
    k_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
    v_grad = tl.zeros([ROWS, BLOCK_P], tl.float32)
    for member in range(RATIO):
        head = group * RATIO + member
        for start in range(low, high, COLUMNS):
            other = start + tl.arange(0, COLUMNS)
            seen = other < high
            other_token = tl.load(TOKEN + other, mask=seen, other=0)
            other_window = tl.load(WINDOW + other, mask=seen, other=-2)
            seen = seen & (other_window >= 0)  # between two rows lie tokens of no window
            together = window[:, None] == other_window[None, :]
            q = rows_at(Q + head * q_head, other_token, length, q_batch, q_token, columns_n, seen, N)
            grad = rows_at(O_GRAD + head * g_head, other_token, length, g_batch, g_token, columns_p, seen, P)
            lse = tl.load(LSE + other_token * HEADS + head, mask=seen, other=0.0)
            delta = tl.load(DELTA + other_token * HEADS + head, mask=seen, other=0.0)
            exponent = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :]
            weights = tl.where(together, tl.exp2(tl.minimum(exponent, 0.0)), 0.0)
            v_grad = tl.dot(weights.to(grad.dtype), grad, v_grad, input_precision=PRECISION)
            target = tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
            k_grad = tl.dot((weights * target).to(q.dtype), q, k_grad, input_precision=PRECISION)
    at = (token * groups + group)[:, None]
    real = (place < count)[:, None]
    k_grad = k_grad * natural_scale
    where = real & (columns_n < N)[None, :]
    tl.store(K_GRAD + at * N + columns_n[None, :], k_grad.to(K_GRAD.dtype.element_ty), mask=where)
    where = real & (columns_p < P)[None, :]
    tl.store(V_GRAD + at * P + columns_p[None, :], v_grad.to(V_GRAD.dtype.element_ty), mask=where)


def sort_tokens(window_id: Tensor) -> dict[str, Tensor]:
    """The tokens of a batch in order of row and window, (B·L,) int64 each, under the names of the kernels.

    TOKEN is a token's index in the flattened batch; WINDOW numbers the windows of all rows, -1 in none; FIRST
    and LAST say where its window starts and where the next one does. Nothing is asked from the device.
    """
    batch, length = window_id.shape
    by_id = window_id.flatten().argsort(stable=True)
    token = by_id[(by_id // length).argsort(stable=True)]
    ids, row = window_id.flatten()[token], token // length
    place = torch.arange(batch * length, device=window_id.device)
    starts = torch.ones_like(place, dtype=torch.bool)
    starts[1:] = (ids[1:] != ids[:-1]) | (row[1:] != row[:-1])
    first = torch.where(starts, place, 0).cummax(0).values
    ends = torch.ones_like(starts)
    ends[:-1] = starts[1:]
    last = torch.where(ends, place + 1, batch * length).flip(0).cummin(0).values.flip(0)
    window = torch.where(ids >= 0, starts.cumsum(0), -1)
    return {"TOKEN": token, "WINDOW": window, "FIRST": first, "LAST": last}


def shared_arguments(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict:
    """Sizes, strides and tiles that all three kernels take."""
    heads, state = q.shape[2:]
    head_dim = v.shape[3]
    half = q.dtype != torch.float32
    return {
        **stride_arguments(q=q, k=k, v=v),
        "length": q.shape[1],
        "count": q.shape[0] * q.shape[1],
        "scale": scale * LOG2_E,
        "HEADS": heads,
        "RATIO": heads // k.shape[2],
        "N": state,
        "P": head_dim,
        "BLOCK_N": tile_size(state),
        "BLOCK_P": tile_size(head_dim),
        "ROWS": 64 if half else 32,
        "COLUMNS": 64 if half else 32,
        "PRECISION": precision(q.dtype),
        "num_warps": 8,
        "num_stages": 1,
    }


@launching
def forward(q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`batched_windows.forward` on Triton kernels: o (B, L, H, P), and lse (B, L, H) as a power of two."""
    q, k, v = (rows_of(tensor.to(q.dtype)) for tensor in (q, k, v))
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    arguments = shared_arguments(q, k, v, scale)
    blocks = triton.cdiv(arguments["count"], arguments["ROWS"])
    attend_kernel[(q.shape[2] * blocks,)](q, k, v, **sort_tokens(window_id), OUT=o, LSE=lse, **arguments)
    return o, lse


@launching
def backward(
    o_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_id: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batched_windows.backward` on Triton kernels: the gradients of q, k and v in the dtype of `q`."""
    q, k, v, o_grad = (rows_of(tensor.to(q.dtype)) for tensor in (q, k, v, o_grad))
    delta = torch.where((window_id >= 0)[..., None], (o.float() * o_grad.float()).sum(-1), 0)
    tokens = sort_tokens(window_id)
    arguments = shared_arguments(q, k, v, scale) | stride_arguments(g=o_grad) | {"natural_scale": scale}
    scores = {"LSE": lse, "DELTA": delta}
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)]
    blocks = triton.cdiv(arguments["count"], arguments["ROWS"])
    query_gradient_kernel[(q.shape[2] * blocks,)](
        q, k, v, o_grad, **tokens, **scores, Q_GRAD=grads[0], **arguments
    )
    arguments["COLUMNS"] = 32  # it holds two gradients in its registers
    key_gradient_kernel[(k.shape[2] * blocks,)](
        q, k, v, o_grad, **tokens, **scores, K_GRAD=grads[1], V_GRAD=grads[2], **arguments
    )
    return tuple(grads)
