# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the write side of the scan's gradient: those of x and B, and the scalars of their pairs.

Letters and equations as in `torch_engine.backward`. A program loops over the heads that share a group, so
nothing is added atomically, and forms (C Bᵀ)ᵀ = B Cᵀ as a product of its own instead of transposing a result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import contiguous, stride_arguments, tile_size
from ..kernels.scalars import Scalars
from ..kernels.tiles import (
    add_product,
    half_step,
    head_of,
    load_tile,
    pair_decay,
    pair_gates,
    pair_masks,
    pair_products,
    part_size,
    state_products,
    token_rows,
)

WARPS = 8


@triton.jit
def through_state(
    STATE, WRITE_WEIGHT, PRODUCT, k, b_token, v, x_token, rows, valid, columns_n, columns_p,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, STEP_N: tl.constexpr,
    STEP_P: tl.constexpr, ROWS: tl.constexpr, OF_X: tl.constexpr,
):  # fmt: skip
    """The gradient of writes through the state that they leave, in one direction; for B, PRODUCT becomes
    B_jᵀ S̄ x_j."""
    if OF_X:
        pulled = state_products(k, b_token, rows, valid, STATE, columns_p, N, P, P, 1, BLOCK_P, STEP_N, ROWS)
    else:
        pulled = state_products(v, x_token, rows, valid, STATE, columns_n, P, N, 1, P, BLOCK_N, STEP_P, ROWS)
        k_tile = load_tile(k, rows, b_token, columns_n, valid, N).to(tl.float32)
        tl.store(PRODUCT, tl.sum(pulled * k_tile, 1))
    return pulled * tl.load(WRITE_WEIGHT)[:, None]


@triton.jit
def writer_kernel(
    X, B, C, Y_GRAD, DT, FORWARD_SUM, REVERSE_SUM, FORWARD_GATE, REVERSE_GATE, SEGMENT, BEGIN, VALID,
    FORWARD_WRITE_WEIGHT, REVERSE_WRITE_WEIGHT, FORWARD_STATE, REVERSE_STATE, D, X_GRAD, B_GRAD, DT_GRAD,
    FORWARD_WRITE_PRODUCT, REVERSE_WRITE_PRODUCT,
    x_batch, x_token, x_head, b_batch, b_token, b_head, c_batch, c_token, c_head, g_batch, g_token, g_head,
    length, chunks,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, STEP_N: tl.constexpr, STEP_P: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_VISION: tl.constexpr, HAS_SEQUENCE: tl.constexpr,
    HAS_SKIP: tl.constexpr, OF_X: tl.constexpr,
):  # fmt: skip
    """The gradient of x or of B of a part of a chunk, head by head of a group: `inside_chunk` and
    `write_side` of the torch engine. The launch for B also stores the scalars."""
    groups = HEADS // RATIO
    group = tl.program_id(0) % groups
    part = tl.program_id(0) // groups % (CHUNK // ROWS)
    chunk = tl.program_id(0) // (groups * (CHUNK // ROWS))
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    j = part * ROWS + tl.arange(0, ROWS)
    rows, valid = token_rows(VALID, batch, chunk * CHUNK + part * ROWS, length, ROWS, HAS_VALID)
    k = head_of(B, batch, b_batch, group, b_head)
    v = head_of(X, batch, x_batch, group, x_head)
    at_segment = (batch * chunks + chunk) * CHUNK
    total = tl.zeros([ROWS, BLOCK_P if OF_X else BLOCK_N], tl.float32)
    for member in tl.range(0, RATIO, disable_licm=True):  # or addresses of all tiles are held throughout
        head = group * RATIO + member
        at_chunk = (batch * chunks + chunk) * HEADS + head
        at = at_chunk * CHUNK + j
        q = head_of(C, batch, c_batch, head, c_head)
        grad = head_of(Y_GRAD, batch, g_batch, head, g_head)
        dt = tl.load(DT + at)
        dt_grad = tl.zeros([ROWS], tl.float32)
        for other in range(0 if HAS_VISION else part, CHUNK // ROWS):
            i = other * ROWS + tl.arange(0, ROWS)
            at_i = at_chunk * CHUNK + i
            readers, seen = token_rows(VALID, batch, chunk * CHUNK + other * ROWS, length, ROWS, HAS_VALID)
            scores = pair_products(k, b_token, rows, valid, q, c_token, readers, seen, N, STEP_N, ROWS)
            before, together = pair_masks(
                i[None, :], j[:, None], SEGMENT, BEGIN, at_segment, HAS_VISION, HAS_SEQUENCE
            )
            decay = pair_decay(
                i[None, :], j[:, None], FORWARD_SUM, REVERSE_SUM, at_i[None, :], at[:, None], HAS_VISION
            )
            decay *= pair_gates(before, together, FORWARD_GATE, REVERSE_GATE, at_i[None, :], HAS_VISION)
            if OF_X:
                weights = scores * decay * dt[:, None]
                if HAS_SKIP:
                    weights += tl.where(j[:, None] == i[None, :], tl.load(D + head).to(tl.float32), 0.0)
                grad_tile = load_tile(grad, readers, g_token, columns_p, seen, P)
                total = add_product(weights, grad_tile, total)
            else:
                target = decay * pair_products(
                    v, x_token, rows, valid, grad, g_token, readers, seen, P, STEP_P, ROWS
                )
                q_tile = load_tile(q, readers, c_token, columns_n, seen, N)
                total = add_product(target * dt[:, None], q_tile, total)
                dt_grad += tl.sum(scores * target, 1)
        if not OF_X:
            tl.store(DT_GRAD + at, dt_grad)
        total += through_state(
            FORWARD_STATE + at_chunk * (N * P),
            FORWARD_WRITE_WEIGHT + at,
            FORWARD_WRITE_PRODUCT + at,
            k,
            b_token,
            v,
            x_token,
            rows,
            valid,
            columns_n,
            columns_p,
            N,
            P,
            BLOCK_N,
            BLOCK_P,
            STEP_N,
            STEP_P,
            ROWS,
            OF_X,
        )
        if HAS_VISION:
            total += through_state(
                REVERSE_STATE + at_chunk * (N * P),
                REVERSE_WRITE_WEIGHT + at,
                REVERSE_WRITE_PRODUCT + at,
                k,
                b_token,
                v,
                x_token,
                rows,
                valid,
                columns_n,
                columns_p,
                N,
                P,
                BLOCK_N,
                BLOCK_P,
                STEP_N,
                STEP_P,
                ROWS,
                OF_X,
            )
    place = ((batch * length + rows) * groups + group)[:, None]
    real = (rows < length)[:, None]
    if OF_X:
        out = X_GRAD + place * P + columns_p[None, :]
        tl.store(out, total.to(X_GRAD.dtype.element_ty), mask=real & (columns_p < P)[None, :])
    else:
        out = B_GRAD + place * N + columns_n[None, :]
        tl.store(out, total.to(B_GRAD.dtype.element_ty), mask=real & (columns_n < N)[None, :])


def write_gradients(
    x: Tensor, B: Tensor, C: Tensor, y_grad: Tensor, scalars: Scalars, D: Tensor | None, state_grads: Tensor
) -> dict[str, Tensor | None]:
    """Run `writer_kernel` twice.

    Returns:
        X_GRAD (B, L, G, P), B_GRAD (B, L, G, N), and (B, K, H, C) float32, None for a direction that is not
        there: DT_GRAD at fixed dt A, of pairs inside chunks; FORWARD_WRITE_PRODUCT and
        REVERSE_WRITE_PRODUCT, B_jᵀ S̄ x_j, the write weight left out.
    """
    has_vision = scalars.gates is not None
    results = {name: torch.empty_like(scalars.dt) for name in ("DT_GRAD", "FORWARD_WRITE_PRODUCT")}
    results["REVERSE_WRITE_PRODUCT"] = torch.empty_like(scalars.dt) if has_vision else None
    results |= {"X_GRAD": x.new_empty(x.shape), "B_GRAD": B.new_empty(B.shape)}
    batch, chunks, heads, chunk = scalars.dt.shape
    groups, state, head_dim = x.shape[2], B.shape[3], x.shape[3]
    rows = part_size(x.dtype, chunk)
    launch = writer_kernel[(groups * (chunk // rows) * chunks, batch)]
    for of_x in (True, False):  # two launches: the registers do not hold both gradients
        launch(
            x,
            B,
            C,
            y_grad,
            **scalars.arguments(),
            **scalars.by_direction("WRITE_WEIGHT", scalars.write_weight),
            **scalars.by_direction("STATE", state_grads),
            **stride_arguments(x=x, b=B, c=C, g=y_grad),
            **results,
            D=contiguous(D),
            length=x.shape[1],
            RATIO=heads // groups,
            N=state,
            P=head_dim,
            BLOCK_N=tile_size(state),
            BLOCK_P=tile_size(head_dim),
            STEP_N=half_step(state, x.dtype),
            STEP_P=half_step(head_dim, x.dtype),
            ROWS=rows,
            HAS_SKIP=D is not None,
            OF_X=of_x,
            num_warps=WARPS,
            num_stages=1,
        )
    return results
