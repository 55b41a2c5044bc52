"""The registered operators of `linmu::`, a forward and a backward pass each, on the engine of their tensors.

They are opaque to torch.compile, which sees only the shapes and dtypes that the fake implementations promise,
and they take their gradient from the operator of the backward pass, so that checkpointing and fullgraph
compilation hold on both engines. Kernels are imported when the first tensor needs them: no other engine needs
Triton.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..decoding import torch_step as step
from ..engine import choose_engine
from ..engine.operator import operator
from ..layout import plan as plans
from ..layout.sorts import Sorted
from ..precision import accumulation_dtype
from ..window_attention import torch_engine as batched_windows
from .torch_engine import backward as chunked_scan_backward
from .torch_engine import forward as chunked_scan
from .torch_engine import norm as torch_heads


@cache
def kernels(name: str) -> ModuleType:
    """The module of this package that holds the Triton kernels called `name`."""
    return importlib.import_module(f"linmu.optimized.{name}")


def like_inputs(grads, tensors) -> list[Tensor]:
    """The gradients of the tensors that are there, contiguous and in their dtypes."""
    pairs = zip(grads, tensors, strict=True)
    return [grad.to(tensor.dtype).contiguous() for grad, tensor in pairs if tensor is not None]


def empty_like_inputs(tensors) -> list[Tensor]:
    """What `like_inputs` promises."""
    return [tensor.new_empty(tensor.shape) for tensor in tensors if tensor is not None]


def in_place_of(inputs, grads: list[Tensor], without: tuple[int, ...] = ()) -> tuple[Tensor | None, ...]:
    """One entry for each input: its gradient, or None if it is None or among the places `without` one."""
    following = iter(grads)
    has_none = (tensor is None or place in without for place, tensor in enumerate(inputs))
    return tuple(None if nothing else next(following) for nothing in has_none)


def save_inputs(ctx, inputs, output) -> None:
    """Keep the inputs of an operator, tensors or None all of them."""
    ctx.save_for_backward(*inputs)


@operator("scan")
def scan(
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
    inputs = (x, dt, A, B, C, gate, segment, valid, D, initial_state)
    engine = choose_engine("bidirectional_scan", x, B.shape[-1], x.shape[-1])
    return (chunked_scan if engine == "torch" else kernels("scan.kernels.output")).forward(*inputs)


@scan.register_fake
def _(x, dt, A, B, C, gate, segment, valid, D, initial_state):
    batch, length, heads, state = C.shape
    final_state = x.new_empty(batch, heads, state, x.shape[3], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(batch, length, heads, x.shape[3]), final_state


@operator("scan_backward")
def scan_backward(
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
    """The gradients of x, dt, A, B, C and of those of gate, D, initial_state that are there."""
    inputs = (x, dt, A, B, C, gate, segment, valid, D, initial_state)
    engine = choose_engine("bidirectional_scan", x, B.shape[-1], x.shape[-1])
    module = chunked_scan_backward if engine == "torch" else kernels("scan.kernels_backward.scalars")
    grads = module.backward(y_grad, final_grad, *inputs)
    return like_inputs(grads, (x, dt, A, B, C, gate, D, initial_state))


@scan_backward.register_fake
def _(y_grad, final_grad, x, dt, A, B, C, gate, segment, valid, D, initial_state):
    return empty_like_inputs((x, dt, A, B, C, gate, D, initial_state))


def _scan_gradients(ctx, y_grad: Tensor, final_grad: Tensor):
    inputs = ctx.saved_tensors
    return in_place_of(inputs, scan_backward(y_grad, final_grad, *inputs), without=(6, 7))


scan.register_autograd(_scan_gradients, setup_context=save_inputs)


@operator("scan_heads")
def scan_heads(
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
    order: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    keep: bool,
    openings: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan, each head normed, back in token order; and what the norm's gradient needs.

    openings are those of segment and valid: kernels find them themselves where they are not given.
    """
    inputs = (x, dt, A, B, C, gate, segment, valid, D, initial_state, order, norm_weight, eps, keep)
    if choose_engine("bidirectional_scan", x, B.shape[-1], x.shape[-1]) == "torch":
        return torch_heads.forward_heads(*inputs)
    return kernels("scan.kernels.output").forward_heads(*inputs, openings)


@scan_heads.register_fake
def _(x, dt, A, B, C, gate, segment, valid, D, initial_state, order, norm_weight, eps, keep, openings):
    batch, length, heads, state = C.shape
    final_state = x.new_empty(batch, heads, state, x.shape[3], dtype=accumulation_dtype(x.dtype))
    keep = keep and norm_weight is not None
    kept = x.new_empty(
        (batch, length, heads, x.shape[3]) if keep else 0, dtype=torch_heads.kept_dtype(x.dtype)
    )
    return x.new_empty(batch, length, heads, x.shape[3]), final_state, kept


@operator("norm_heads_backward")
def norm_heads_backward(
    z_grad: Tensor, y: Tensor, norm_weight: Tensor, order: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of the scan's output, in scan order, and of the norm's weight."""
    module = (
        torch_heads
        if choose_engine("bidirectional_scan", y) == "torch"
        else kernels("scan.kernels_backward.norm")
    )
    y_grad, weight_grad = module.norm_gradient(z_grad, y, norm_weight, order, eps)
    return y_grad, weight_grad.to(norm_weight.dtype)


@norm_heads_backward.register_fake
def _(z_grad, y, norm_weight, order, eps):
    return y.new_empty(y.shape), norm_weight.new_empty(norm_weight.shape)


def _save_heads(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # what is kept for the gradient has none itself
    ctx.save_for_backward(*inputs[:12], output[2])
    ctx.eps = inputs[12]
    ctx.shapes = [(tensor.shape, tensor.dtype) for tensor in output[:2]]


def _heads_gradients(ctx, *grads: Tensor | None):
    *inputs, order, norm_weight, y = ctx.saved_tensors
    y_grad, final_grad = (
        inputs[0].new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, (shape, dtype) in zip(grads[:2], ctx.shapes, strict=True)
    )
    weight_grad = None
    if norm_weight is not None:
        y_grad, weight_grad = norm_heads_backward(y_grad, y, norm_weight, order, ctx.eps)
    else:
        y_grad = torch_heads.in_scan_order(y_grad, order)
    scan_grads = in_place_of(inputs, scan_backward(y_grad, final_grad, *inputs), without=(6, 7))
    return *scan_grads, None, weight_grad, None, None, None


scan_heads.register_autograd(_heads_gradients, setup_context=_save_heads)


@operator("scan_step")
def scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the new state of one token."""
    engine = choose_engine("scan_step", x, B.shape[-1], x.shape[-1])
    return (step if engine == "torch" else kernels("decoding.kernels.scan_step")).advance(
        state, x, dt, A, B, C, D, valid
    )


@scan_step.register_fake
def _(state, x, dt, A, B, C, D, valid):
    y = x.new_empty(x.shape[0], C.shape[1], x.shape[2])
    return y, state.new_empty(state.shape, dtype=accumulation_dtype(x.dtype))


@operator("scan_step_backward")
def scan_step_backward(
    y_grad: Tensor,
    new_state_grad: Tensor,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    valid: Tensor | None,
) -> list[Tensor]:
    """The gradients of state, x, dt, A, B, C and, if it is there, D; in torch on both engines."""
    grads = step.gradient(y_grad, new_state_grad, state, x, dt, A, B, C, D, valid)
    return like_inputs(grads, (state, x, dt, A, B, C, D))


@scan_step_backward.register_fake
def _(y_grad, new_state_grad, state, x, dt, A, B, C, D, valid):
    return empty_like_inputs((state, x, dt, A, B, C, D))


def _scan_step_gradients(ctx, y_grad: Tensor, new_state_grad: Tensor):
    inputs = ctx.saved_tensors
    return in_place_of(inputs, scan_step_backward(y_grad, new_state_grad, *inputs), without=(7,))


scan_step.register_autograd(_scan_step_gradients, setup_context=save_inputs)


@operator("window_plan")
def window_plan(window_id: Tensor) -> tuple[Tensor, Tensor]:
    """places and blocks: what the kernels of `window_attention` need to know of the windows."""
    return plans.window_plan(window_id)


@window_plan.register_fake
def _(window_id):
    tokens = window_id.shape[0] * window_id.shape[1]
    places = window_id.new_empty((2, tokens), dtype=torch.int32)
    return places, window_id.new_empty((1 + plans.most_blocks(tokens), 4), dtype=torch.int32)


@operator("layout_plan")
def layout_plan(
    token: Tensor,
    columns: Tensor,
    segment: Tensor,
    segments: int,
    largest: list[int],
    narrow: bool,
    vision: int,
    window_thw: list[int],
    shifted: bool,
    text: bool,
) -> tuple[Tensor, Tensor]:
    """The same of a layout's windows, from the six fields of its `layout_sorts.Sorted`; text too, or not."""
    prompt = Sorted(token, columns, segment, segments, largest, narrow)
    return plans.layout_plan(prompt, vision, window_thw, shifted, text)


@layout_plan.register_fake
def _(token, columns, segment, segments, largest, narrow, vision, window_thw, shifted, text):
    tokens = token.shape[0] if text else vision
    places = token.new_empty((2, tokens), dtype=torch.int32)
    return places, token.new_empty((1 + plans.most_blocks(tokens), 4), dtype=torch.int32)


@operator("window_attention")
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, places: Tensor, blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """o, and the logarithm of softmax's denominator, (B, L, H), that the backward pass starts from.

    places and blocks are the plan of `window_id`.
    """
    if choose_engine("window_attention", q, q.shape[-1], v.shape[-1]) == "torch":
        return batched_windows.forward(q, k, v, window_id, scale)
    return kernels("window_attention.kernels").forward(q, k, v, places, blocks, scale)


@window_attention.register_fake
def _(q, k, v, window_id, places, blocks, scale):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    return o, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@operator("window_attention_backward")
def window_attention_backward(
    o_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_id: Tensor,
    places: Tensor,
    blocks: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> list[Tensor]:
    """The gradients of q, k and v."""
    if choose_engine("window_attention", q, q.shape[-1], v.shape[-1]) == "torch":
        grads = batched_windows.backward(o_grad, q, k, v, window_id, o, lse, scale)
    else:
        grads = kernels("window_attention.kernels_backward").backward(
            o_grad, q, k, v, places, blocks, o, lse, scale
        )
    return like_inputs(grads, (q, k, v))


@window_attention_backward.register_fake
def _(o_grad, q, k, v, window_id, places, blocks, o, lse, scale):
    return empty_like_inputs((q, k, v))


def _save_attention(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_gradients(ctx, o_grad: Tensor, _):
    return *window_attention_backward(o_grad, *ctx.saved_tensors, ctx.scale), None, None, None, None


window_attention.register_autograd(_attention_gradients, setup_context=_save_attention)
