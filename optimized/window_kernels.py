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
from .scan_tiles import as_factor, precision, rows_of, stride_arguments, tile_size

LOG2_E = 1.4426950408889634
ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}  # tokens


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
def mates(TOKEN, WINDOW, start, high, COLUMNS: tl.constexpr):
    """A block of sorted tokens from `start` on: (token, window, seen)."""
    place = start + tl.arange(0, COLUMNS)
    seen = place < high
    token = tl.load(TOKEN + place, mask=seen, other=0)
    window = tl.load(WINDOW + place, mask=seen, other=-2)
    return token, window, seen & (window >= 0)  # between two rows lie tokens of no window


@triton.jit
def places(token, length, batch_stride, token_stride):
    """Where tokens of the flattened (B, L) begin."""
    return (token // length) * batch_stride + (token % length) * token_stride


@triton.jit
def tile_at(base, place, columns, taken, SIZE: tl.constexpr):
    """Tiles of one head at gathered places."""
    where = taken[:, None] & (columns < SIZE)[None, :]
    return tl.load(base + place[:, None] + columns[None, :], mask=where, other=0.0)


@triton.jit
def products(
    left,
    left_place,
    taken,
    right,
    right_place,
    seen,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left_i · right_j, (ROWS, COLUMNS), a step of the head dim after the other."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, SIZE, STEP):
        columns = start + tl.arange(0, STEP)
        left_tile = tile_at(left, left_place, columns, taken, SIZE)
        right_tile = tile_at(right, right_place, columns, seen, SIZE)
        total = tl.dot(left_tile, tl.trans(right_tile), total, input_precision=PRECISION)
    return total


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
    BLOCK_P: tl.constexpr,
    STEP_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eq. (1): `attend` of the reference for a block of tokens of one head."""
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    place = tl.cast(tl.program_id(0) // HEADS, tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_P)
    token, window, taken, low, high = block_of_tokens(TOKEN, WINDOW, FIRST, LAST, count, place)
    q, k, v = Q + head * q_head, K + head // RATIO * k_head, V + head // RATIO * v_head
    q_place = places(token, length, q_batch, q_token)
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_P], tl.float32)
    for start in range(low, high, COLUMNS):
        other, other_window, seen = mates(TOKEN, WINDOW, start, high, COLUMNS)
        k_place = places(other, length, k_batch, k_token)
        scores = products(q, q_place, taken, k, k_place, seen, N, STEP_N, ROWS, COLUMNS, PRECISION)
        together = window[:, None] == other_window[None, :]
        scores = tl.where(together, scores * scale, -1e30)
        highest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.where(together, tl.exp2(scores - highest[:, None]), 0.0)
        shrink = tl.exp2(largest - highest)
        total = total * shrink + tl.sum(weights, 1)
        tile = tile_at(v, places(other, length, v_batch, v_token), columns, seen, P).to(tl.float32)
        out = tl.dot(as_factor(weights, V), tile, out * shrink[:, None], input_precision=PRECISION)
        largest = highest
    total = tl.where(taken, total, 1.0)
    at = token * HEADS + head
    real = place < count
    out = tl.where(taken[:, None], out / total[:, None], 0.0)
    where = real[:, None] & (columns < P)[None, :]
    tl.store(OUT + at[:, None] * P + columns[None, :], out.to(OUT.dtype.element_ty), mask=where)
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
    STEP_N: tl.constexpr,
    STEP_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eq. (2), q̄, for a block of tokens of one head."""
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    place = tl.cast(tl.program_id(0) // HEADS, tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_N)
    token, window, taken, low, high = block_of_tokens(TOKEN, WINDOW, FIRST, LAST, count, place)
    q, k, v = Q + head * q_head, K + head // RATIO * k_head, V + head // RATIO * v_head
    grad = O_GRAD + head * g_head
    q_place, g_place = places(token, length, q_batch, q_token), places(token, length, g_batch, g_token)
    at = token * HEADS + head
    lse = tl.load(LSE + at, mask=taken, other=0.0)
    delta = tl.load(DELTA + at, mask=taken, other=0.0)
    q_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(low, high, COLUMNS):
        other, other_window, seen = mates(TOKEN, WINDOW, start, high, COLUMNS)
        k_place = places(other, length, k_batch, k_token)
        v_place = places(other, length, v_batch, v_token)
        scores = products(q, q_place, taken, k, k_place, seen, N, STEP_N, ROWS, COLUMNS, PRECISION)
        together = window[:, None] == other_window[None, :]
        weights = tl.where(together, tl.exp2(tl.minimum(scores * scale - lse[:, None], 0.0)), 0.0)
        target = products(grad, g_place, taken, v, v_place, seen, P, STEP_P, ROWS, COLUMNS, PRECISION)
        tile = tile_at(k, k_place, columns, seen, N).to(tl.float32)
        weights = as_factor(weights * (target - delta[:, None]), K)
        q_grad = tl.dot(weights, tile, q_grad, input_precision=PRECISION)
    where = (place < count)[:, None] & (columns < N)[None, :]
    q_grad = q_grad * natural_scale
    tl.store(Q_GRAD + at[:, None] * N + columns[None, :], q_grad.to(Q_GRAD.dtype.element_ty), mask=where)


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
    STEP_N: tl.constexpr,
    STEP_P: tl.constexpr,
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
    k, v = K + group * k_head, V + group * v_head
    k_place, v_place = places(token, length, k_batch, k_token), places(token, length, v_batch, v_token)
    k_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
    v_grad = tl.zeros([ROWS, BLOCK_P], tl.float32)
    for member in range(RATIO):
        head = group * RATIO + member
        q, grad = Q + head * q_head, O_GRAD + head * g_head
        for start in range(low, high, COLUMNS):
            other, other_window, seen = mates(TOKEN, WINDOW, start, high, COLUMNS)
            together = window[:, None] == other_window[None, :]
            q_place = places(other, length, q_batch, q_token)
            g_place = places(other, length, g_batch, g_token)
            lse = tl.load(LSE + other * HEADS + head, mask=seen, other=0.0)
            delta = tl.load(DELTA + other * HEADS + head, mask=seen, other=0.0)
            scores = products(k, k_place, taken, q, q_place, seen, N, STEP_N, ROWS, COLUMNS, PRECISION)
            weights = tl.where(together, tl.exp2(tl.minimum(scores * scale - lse[None, :], 0.0)), 0.0)
            tile = tile_at(grad, g_place, columns_p, seen, P).to(tl.float32)
            v_grad = tl.dot(as_factor(weights, O_GRAD), tile, v_grad, input_precision=PRECISION)
            target = products(v, v_place, taken, grad, g_place, seen, P, STEP_P, ROWS, COLUMNS, PRECISION)
            weights = as_factor(weights * (target - delta[None, :]), Q)
            tile = tile_at(q, q_place, columns_n, seen, N).to(tl.float32)
            k_grad = tl.dot(weights, tile, k_grad, input_precision=PRECISION)
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
    head_dim, rows = v.shape[3], ROWS[q.dtype]
    return {
        **stride_arguments(q=q, k=k, v=v),
        "length": q.shape[1],
        "count": q.shape[0] * q.shape[1],
        "scale": scale * LOG2_E,
        "HEADS": heads,
        "RATIO": heads // k.shape[2],
        "N": state,
        "P": head_dim,
        "STEP_N": attention_step(state, q.dtype),
        "ROWS": rows,
        "COLUMNS": rows,
        "PRECISION": precision(q.dtype),
        "num_warps": 8 if rows > 16 else 4,
        "num_stages": 1,
    }


def attention_step(size: int, dtype: torch.dtype) -> int:
    """How much of an axis of `size` a product takes at once: all of it, if tensor cores multiply."""
    return 16 if dtype == torch.float32 else tile_size(size)


@launching
def forward(q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`batched_windows.forward` on Triton kernels: o (B, L, H, P), and lse (B, L, H) as a power of two."""
    q, k, v = (rows_of(tensor.to(q.dtype)) for tensor in (q, k, v))
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    arguments = shared_arguments(q, k, v, scale)
    blocks = triton.cdiv(arguments["count"], arguments["ROWS"])
    attend_kernel[(q.shape[2] * blocks,)](
        q, k, v, **sort_tokens(window_id), OUT=o, LSE=lse, BLOCK_P=tile_size(v.shape[3]), **arguments
    )
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
    arguments |= {"BLOCK_N": tile_size(q.shape[3]), "STEP_P": attention_step(v.shape[3], q.dtype)}
    arguments["COLUMNS"] = min(32, arguments["ROWS"])  # gradients take more registers
    scores = {"LSE": lse, "DELTA": delta}
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)]
    blocks = triton.cdiv(arguments["count"], arguments["ROWS"])
    query_gradient_kernel[(q.shape[2] * blocks,)](
        q, k, v, o_grad, **tokens, **scores, Q_GRAD=grads[0], **arguments
    )
    arguments["BLOCK_P"] = tile_size(v.shape[3])
    key_gradient_kernel[(k.shape[2] * blocks,)](
        q, k, v, o_grad, **tokens, **scores, K_GRAD=grads[1], V_GRAD=grads[2], **arguments
    )
    return tuple(grads)
