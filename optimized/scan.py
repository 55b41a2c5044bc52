"""The operators of `reference/scan.py`, fast: one registered operator per pass, on the engine of the tensors.

Letters as there: B batch, L tokens, H query heads, G groups, N state size, P head dim, K conv taps. The scan
runs in chunks of tokens, as matrix products: `chunked_scan.py` has the equations and the torch engine.

Differs from the reference in one precondition: two segments of a row must not interleave, as in every layout.
A tensor on the CPU is checked; on a GPU the check would wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.scan import check_bidirectional, check_conv, check_scan
from . import chunked_scan, chunked_scan_backward
from .checks import require, require_mask, require_shape
from .conv import convolve, convolve_valid
from .engine import choose_engine
from .precision import accumulation_dtype, without_autocast
from .scan_masks import interleaved_row
from .step import advance


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
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.selective_scan`: one direction; arguments, result and errors are the same."""
    check_scan("selective_scan", x, dt, A, B, C, mask=mask, initial_state=initial_state)
    if reverse:
        x, dt, B, C = (tensor.flip(1) for tensor in (x, dt, B, C))
        mask = None if mask is None else mask.flip(1)
    y, final_state = scan_operator(x, dt, A, B, C, None, None, mask, None, initial_state)
    return y.flip(1) if reverse else y, final_state


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
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.bidirectional_scan`: arguments and result are the same, in any order of segments.

    Raises:
        ValueError: as the reference, and on a CPU if two segments interleave.
    """
    where = "bidirectional_scan"
    check_scan(where, x, dt, A, B, C, mask=valid, initial_state=initial_state, mask_name="valid")
    check_bidirectional(where, C, gate, segment, D)
    if segment is None:
        gate = None
    elif segment.device.type == "cpu" and not torch.compiler.is_compiling():
        row = interleaved_row(segment, valid)
        require(row is None, where, "two segments must never interleave", f"row {row}")
    return scan_operator(x, dt, A, B, C, gate, segment, valid, D, initial_state)


@torch.library.custom_op("linmu::scan", mutates_args=())
def scan_operator(
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
    """y and the final state; with `segment` None there is one direction and `gate` is None too."""
    choose_engine("bidirectional_scan", x, B.shape[-1], x.shape[-1])
    return chunked_scan.forward(x, dt, A, B, C, gate, segment, valid, D, initial_state)


@scan_operator.register_fake
def _(x, dt, A, B, C, gate, segment, valid, D, initial_state):
    batch, length, heads, state = C.shape
    head_dim, dtype = x.shape[-1], accumulation_dtype(x.dtype)
    y = x.new_empty(batch, length, heads, head_dim)
    return y, x.new_empty(batch, heads, state, head_dim, dtype=dtype)


@torch.library.custom_op("linmu::scan_backward", mutates_args=())
def scan_backward_operator(
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
) -> list[Tensor]:
    """The gradients of x, dt, A, B, C and of those of gate, D, initial_state that are there, in their
    dtypes.
    """
    inputs = (x, dt, A, B, C, gate, segment, valid, D, initial_state)
    choose_engine("bidirectional_scan", x, B.shape[-1], x.shape[-1])
    grads = chunked_scan_backward.backward(y_grad, final_grad, *inputs)
    pairs = zip(grads, (x, dt, A, B, C, gate, D, initial_state), strict=True)
    return [grad.to(tensor.dtype).contiguous() for grad, tensor in pairs if tensor is not None]


@scan_backward_operator.register_fake
def _(y_grad, final_grad, x, dt, A, B, C, gate, segment, valid, D, initial_state):
    tensors = (x, dt, A, B, C, gate, D, initial_state)
    return [tensor.new_empty(tensor.shape) for tensor in tensors if tensor is not None]


def _save_scan(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _scan_gradients(ctx, y_grad: Tensor, final_grad: Tensor):
    inputs = ctx.saved_tensors
    grads = iter(scan_backward_operator(y_grad, final_grad, *inputs))
    masks = (6, 7)  # segment and valid have none
    return tuple(
        None if tensor is None or place in masks else next(grads) for place, tensor in enumerate(inputs)
    )


scan_operator.register_autograd(_scan_gradients, setup_context=_save_scan)


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
    """`linmu.reference.scan_step`: arguments, result and errors are the same; `state` is left as it was."""
    where = "scan_step"
    for name, tensor, letters in (
        ("x", x, "B, G, P"),
        ("dt", dt, "B, H"),
        ("B", B, "B, G, N"),
        ("C", C, "B, H, N"),
    ):
        require_shape(where, name, tensor, (None,) * (letters.count(",") + 1), letters)
    require_mask(where, "valid", valid, (x.shape[0],), "B")
    mask = None if valid is None else valid[:, None]
    one = [tensor.unsqueeze(1) for tensor in (x, dt, B, C)]  # L = 1
    check_scan(where, *one[:2], A, *one[2:], mask=mask, initial_state=state, mask_name="valid")
    check_bidirectional(where, one[3], one[3][..., 0], None, D)
    return advance(state, x, dt, A, B, C, D, valid)


@without_autocast
def causal_conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.causal_conv`: arguments, result and errors are the same."""
    check_conv("causal_conv", u, weight, bias, mask, initial_state)
    if mask is None:
        return convolve(u, weight, bias, initial_state)
    return convolve_valid(u, weight, bias, mask, initial_state)
