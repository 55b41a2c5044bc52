"""Bugs in how an operator takes its arguments, planted in every operator, loss and step from one table.

A bug receives the reference's operator first, then the arguments of a call by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linmu.reference import WindowState

from ..harness import operator_checks
from ..harness.compare import is_float
from ..properties import (
    test_bidirectional_scan,
    test_causal_conv,
    test_hidden_loss,
    test_layout,
    test_logit_loss,
    test_scan,
    test_scan_step,
    test_sliding_window_attention,
    test_window_attention,
)
from .planting import BUGS, Bug, planted

FILES: dict[str, ModuleType] = {
    "selective_scan": test_scan,
    "bidirectional_scan": test_bidirectional_scan,
    "scan_step": test_scan_step,
    "window_attention": test_window_attention,
    "sliding_window_attention": test_sliding_window_attention,
    "causal_conv": test_causal_conv,
    "hidden_loss": test_hidden_loss,
    "logit_loss": test_logit_loss,
}
FIRST = {  # the float argument that is meant
    "scan_step": "x",
    "window_attention": "q",
    "sliding_window_attention": "q",
    "causal_conv": "u",
}
MASKS = {  # the mask or the ids
    "selective_scan": "mask",
    "bidirectional_scan": "segment",
    "scan_step": "valid",
    "window_attention": "window_id",
    "sliding_window_attention": "valid",
    "causal_conv": "mask",
    "hidden_loss": "valid",
    "logit_loss": "mask",
}
SCANS = ("selective_scan", "bidirectional_scan", "scan_step")
Outputs = Tensor | tuple[Tensor | WindowState, ...]


def first_of(operator: str) -> str:
    """The name of the float argument that the bugs are about."""
    return FIRST.get(operator, "student" if operator.endswith("loss") else "x")


def each(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """All results changed, but for what a state of a window has."""
    if isinstance(outputs, WindowState):
        return WindowState(change(outputs.k), change(outputs.v), outputs.present)
    if isinstance(outputs, tuple):
        return tuple(each(output, change) for output in outputs)
    return change(outputs)


def writes_to_its_tokens(operator: str, reference: Callable, **given: Any) -> Outputs:
    outputs = reference(**given)
    given[first_of(operator)].data.mul_(1.5)
    return outputs


def writes_to_its_mask(operator: str, reference: Callable, **given: Any) -> Outputs:
    mask = given[MASKS[operator]]
    if mask is None:
        return reference(**given)
    outputs = reference(**{**given, MASKS[operator]: mask.clone()})
    mask.data.copy_(torch.zeros_like(mask) if mask.dtype == torch.bool else mask + 1)
    return outputs


def takes_its_mask_for_contiguous(operator: str, reference: Callable, **given: Any) -> Outputs:
    mask = given[MASKS[operator]]
    if mask is not None:
        given[MASKS[operator]] = mask.as_strided(mask.shape, torch.empty(mask.shape).stride())
    return reference(**given)


def takes_its_tokens_for_contiguous(operator: str, reference: Callable, **given: Any) -> Outputs:
    tokens = given[first_of(operator)]
    given[first_of(operator)] = tokens.as_strided(tokens.shape, torch.empty(tokens.shape).stride())
    return reference(**given)


def takes_its_rows_for_adjacent(operator: str, reference: Callable, **given: Any) -> Outputs:
    """Looks at the last stride alone."""
    tokens = given[first_of(operator)]
    if tokens.stride(-1) == 1:
        given[first_of(operator)] = tokens.as_strided(tokens.shape, torch.empty(tokens.shape).stride())
    return reference(**given)


class TakenForContiguous(torch.autograd.Function):
    """The same numbers; a gradient, an `expanded` or a transposed one, is read as if it were contiguous."""

    @staticmethod
    def forward(ctx, tensor: Tensor, expanded: bool) -> Tensor:
        ctx.expanded = expanded
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if gradient.is_contiguous() or ctx.expanded != (0 in gradient.stride()):
            return gradient, None
        numbers = gradient.new_zeros(gradient.numel())
        found = gradient.as_strided(
            (gradient.untyped_storage().nbytes() // gradient.element_size(),), (1,), 0
        )
        numbers[: len(found)] = found[: len(numbers)]
        return numbers.view(gradient.shape), None


def takes_expanded_gradients_for_contiguous(operator: str, reference: Callable, **given: Any) -> Outputs:
    return each(reference(**given), lambda tensor: TakenForContiguous.apply(tensor, True))


def takes_transposed_gradients_for_contiguous(operator: str, reference: Callable, **given: Any) -> Outputs:
    return each(reference(**given), lambda tensor: TakenForContiguous.apply(tensor, False))


def gives_a_view_of_an_argument(operator: str, reference: Callable, **given: Any) -> Outputs:
    """A result without a gradient is written over the first argument, where that is large enough."""
    place = given[first_of(operator)].detach()

    def written_over(tensor: Tensor) -> Tensor:
        if tensor.requires_grad or tensor.numel() > place.numel() or tensor.dtype != place.dtype:
            return tensor
        return place.flatten()[: tensor.numel()].view(tensor.shape).copy_(tensor)

    outputs = reference(**given)
    return (written_over(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else written_over(outputs)


def remembers_its_mask(operator: str, reference: Callable, **given: Any) -> Outputs:
    mask = given[MASKS[operator]]
    if mask is not None:
        given[MASKS[operator]] = mask.__dict__.setdefault("remembered", mask.clone())
    return reference(**given)


BUFFERS: dict[tuple, Tensor] = {}


def writes_its_results_into_one_buffer(operator: str, reference: Callable, **given: Any) -> Outputs:
    places = itertools.count()

    def buffered(tensor: Tensor) -> Tensor:
        place = (operator, next(places), tensor.shape, tensor.dtype)
        return tensor if tensor.requires_grad else BUFFERS.setdefault(place, tensor.clone()).copy_(tensor)

    return each(reference(**given), buffered)


def computes_otherwise_without_gradients(operator: str, reference: Callable, **given: Any) -> Outputs:
    outputs = reference(**given)
    return outputs if torch.is_grad_enabled() else each(outputs, lambda tensor: tensor * 1.01)


def rounds_under_autocast(operator: str, reference: Callable, **given: Any) -> Outputs:
    outputs = reference(**given)
    if not torch.is_autocast_enabled("cpu"):
        return outputs
    return each(outputs, lambda tensor: tensor.bfloat16().to(tensor.dtype) * (1 + 2**-6))


def reads_memory_that_was_not_written(operator: str, reference: Callable, **given: Any) -> Outputs:
    return each(reference(**given), lambda tensor: tensor + 0 * torch.empty_like(tensor))


def gives_gradients_only_if_all_are_asked_for(operator: str, reference: Callable, **given: Any) -> Outputs:
    floats = {name: value for name, value in given.items() if is_float(value)}
    if not all(value.requires_grad for value in floats.values()):
        given |= {name: value.detach() for name, value in floats.items()}
    return reference(**given)


class NeedsBoth(torch.autograd.Function):
    """Two results whose gradients are lost unless both have one."""

    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return first.clone(), second.clone()

    @staticmethod
    def backward(ctx, first: Tensor | None, second: Tensor | None):
        if first is None or second is None:
            return None, None
        return first, second


def gives_gradients_only_if_all_results_have_one(operator: str, reference: Callable, **given: Any) -> Outputs:
    return NeedsBoth.apply(*reference(**given))


class Spoilt(torch.autograd.Function):
    """The same numbers. `how` says what the backward pass does wrong."""

    @staticmethod
    def forward(ctx, tensor: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(torch.ones_like(tensor))
        ctx.how, ctx.place, ctx.own = how, (how, tensor.shape, tensor.dtype), tensor.detach().clone()
        BUFFERS[ctx.place] = ctx.own
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.how == "buffer":
            return gradient * BUFFERS[ctx.place].isclose(ctx.own), None
        if ctx.how == "handed":
            return gradient.mul_(0.5) * 2, None
        (saved,) = ctx.saved_tensors
        found = gradient * saved
        saved.data.mul_(0.5)
        return found, None


def spoils_what_it_saved(operator: str, reference: Callable, **given: Any) -> Outputs:
    return each(reference(**given), lambda tensor: Spoilt.apply(tensor, "saved"))


def saves_in_a_buffer_of_all_calls(operator: str, reference: Callable, **given: Any) -> Outputs:
    return each(reference(**given), lambda tensor: Spoilt.apply(tensor, "buffer"))


def writes_to_the_gradients_it_is_handed(operator: str, reference: Callable, **given: Any) -> Outputs:
    return each(reference(**given), lambda tensor: Spoilt.apply(tensor, "handed"))


def writes_to_its_state_under_inference_mode(operator: str, reference: Callable, **given: Any) -> Outputs:
    outputs = reference(**given)
    state = given.get("state" if operator == "scan_step" else "initial_state")
    if torch.is_inference_mode_enabled() and state is not None:
        (state.k if isinstance(state, WindowState) else state).mul_(0.5)
    return outputs


def gives_its_state_back_where_all_is_masked(operator: str, reference: Callable, **given: Any) -> Outputs:
    y, state = reference(**given)
    mask, name = given[MASKS[operator]], "state" if operator == "scan_step" else "initial_state"
    shortcut = mask is not None and not mask.any() and given[name] is not None
    return y, given[name] if shortcut else state


def keeps_its_tokens_in_a_workspace_of_all_calls(operator: str, reference: Callable, **given: Any) -> Outputs:
    tokens = given[first_of(operator)]
    place = BUFFERS.setdefault((operator, tokens.shape, tokens.dtype), torch.empty(tokens.shape).to(tokens))
    place.copy_(tokens.detach())
    given[first_of(operator)] = place + (tokens - tokens.detach())
    return reference(**given)


LATE = "test_backward_passes_may_come_late_and_twice"
LEFT = "test_arguments_are_left_as_they_were"
VIEWS = "test_results_share_no_memory_with_arguments"

KINDS: tuple[tuple[Callable, str, tuple[str, ...]], ...] = (
    (spoils_what_it_saved, LATE, ("bidirectional_scan", "scan_step", "window_attention", "logit_loss")),
    (
        saves_in_a_buffer_of_all_calls,
        LATE,
        ("selective_scan", "sliding_window_attention", "causal_conv", "hidden_loss"),
    ),
    (writes_to_the_gradients_it_is_handed, LATE, ("selective_scan", "window_attention", "causal_conv")),
    (
        writes_to_its_state_under_inference_mode,
        LEFT,
        ("selective_scan", "scan_step", "sliding_window_attention", "causal_conv"),
    ),
    (
        keeps_its_tokens_in_a_workspace_of_all_calls,
        "test_calls_may_interrupt_each_other",
        ("selective_scan", "window_attention", "scan_step", "logit_loss"),
    ),
    (gives_its_state_back_where_all_is_masked, VIEWS, ("selective_scan", "scan_step", "causal_conv")),
    (writes_to_its_tokens, "test_arguments_are_left_as_they_were", tuple(FILES)),
    (writes_to_its_mask, "test_arguments_are_left_as_they_were", tuple(FILES)),
    (takes_its_tokens_for_contiguous, "test_strides_do_not_matter", tuple(FILES)),
    (takes_its_mask_for_contiguous, "test_strides_do_not_matter", tuple(set(FILES) - {"scan_step"})),
    (takes_its_rows_for_adjacent, "test_strides_do_not_matter", tuple(FILES)),
    (
        takes_expanded_gradients_for_contiguous,
        "test_strides_do_not_matter",
        tuple(set(FILES) - {"hidden_loss", "logit_loss"}),  # a loss is one number
    ),
    (
        takes_transposed_gradients_for_contiguous,
        "test_strides_do_not_matter",
        tuple(set(FILES) - {"hidden_loss", "logit_loss"}),
    ),
    (gives_a_view_of_an_argument, "test_results_share_no_memory_with_arguments", tuple(FILES)),
    (remembers_its_mask, "test_nothing_is_remembered_between_calls", tuple(FILES)),
    (writes_its_results_into_one_buffer, "test_nothing_is_remembered_between_calls", tuple(FILES)),
    (computes_otherwise_without_gradients, "test_results_do_not_depend_on_grad_mode", tuple(FILES)),
    (rounds_under_autocast, "test_autocast_changes_nothing", tuple(FILES)),
    (reads_memory_that_was_not_written, "test_uninitialised_memory_is_never_read", tuple(FILES)),
    (
        gives_gradients_only_if_all_are_asked_for,
        "test_one_gradient_alone_equals_its_share_of_all",
        tuple(set(FILES) - {"hidden_loss", "logit_loss"}),  # a loss's teacher gets none anyway
    ),
    (
        gives_gradients_only_if_all_results_have_one,
        "test_the_gradient_of_each_result_alone_matches_the_reference",
        ("selective_scan", "bidirectional_scan", "scan_step", "causal_conv"),
    ),
)
for kind, test, operators in KINDS:
    for operator in sorted(operators):
        caught_by = (getattr(FILES[operator], test),)
        BUGS.append(Bug(f"{operator}_{kind.__name__}", operator, partial(kind, operator), caught_by))


def wrapped_to_32_bits(ids: Tensor) -> Tensor:
    return ids.int().long()


def rounded_to_float32(ids: Tensor) -> Tensor:
    return ids.float().long()


def rounded_to_float64(ids: Tensor) -> Tensor:
    return ids.double().long()


def packed_in_16_bits(ids: Tensor) -> Tensor:
    return torch.where(ids >= 0, ids & 0xFFFF, ids)


for change in (wrapped_to_32_bits, rounded_to_float32, rounded_to_float64, packed_in_16_bits):

    def with_segments(change, reference, *, segment=None, **given):
        return reference(segment=None if segment is None else change(segment), **given)

    def with_windows(change, reference, *, window_id, **given):
        return reference(window_id=change(window_id), **given)

    segments = test_bidirectional_scan.test_renumbering_the_segments_changes_nothing
    windows = test_window_attention.test_renumbering_the_windows_changes_nothing
    for operator, broken, test in (
        ("bidirectional_scan", with_segments, segments),
        ("window_attention", with_windows, windows),
    ):
        name = f"ids_of_{operator}_are_{change.__name__}"
        BUGS.append(Bug(name, operator, partial(broken, change), (test,)))


@planted("window_ids", test_layout.test_numbers_neighbours_and_padding_do_not_change_the_layout)
def segments_of_windows_are_wrapped_to_32_bits(reference, coords, *given):
    low = torch.where(coords[..., :1] >= 0, coords[..., :1] & 0x7FFFFFFF, -1)
    return reference(torch.cat([low, coords[..., 1:]], dim=-1), *given)


@planted("scan_order", test_layout.test_numbers_neighbours_and_padding_do_not_change_the_layout)
def segments_of_orders_are_wrapped_to_32_bits(reference, coords, *given):
    low = torch.where(coords[..., :1] >= 0, coords[..., :1] & 0x7FFFFFFF, -1)
    return reference(torch.cat([low, coords[..., 1:]], dim=-1), *given)


@planted("scan_order", test_layout.test_layouts_are_not_remembered_between_calls)
def orders_are_written_into_one_buffer(reference, coords, layer_index):
    order = reference(coords, layer_index)
    return BUFFERS.setdefault(("scan_order", order.shape), order.clone()).copy_(order)


@planted("scan_order", test_layout.test_large_coordinates_sort_as_small_ones)
def cells_are_joined_by_thousands(reference, coords, layer_index):
    vision = coords[..., 0] >= 0
    axes = test_layout.AXES[layer_index % 4]
    joined = (coords[..., axes[0]] * 1000 + coords[..., axes[1]]) * 1000 + coords[..., axes[2]]
    rest = torch.where(vision, 0, -1)
    joined = torch.where(vision, joined - joined.min().clamp(max=0), -1)
    return reference(torch.stack([coords[..., 0], joined, rest, rest], dim=-1), 0)


@planted("logit_loss", test_logit_loss.test_half_precision_inputs_are_exact_to_float32)
def logits_are_divided_in_half(reference, *, student, teacher, mask=None, temperature=1.0):
    student, teacher = student / temperature, teacher / temperature
    return temperature**2 * reference(student=student, teacher=teacher, mask=mask)


@planted("scan_order", test_layout.test_scan_order_sorts_by_the_axes_of_its_layer)
def layers_beyond_127_have_another_order(reference, coords, layer_index):
    return reference(coords, layer_index if layer_index < 127 else 0)


@planted("window_ids", test_layout.test_layouts_are_not_remembered_between_calls)
def windows_are_written_into_one_buffer(reference, *given):
    ids = reference(*given)
    return BUFFERS.setdefault(("window_ids", ids.shape), ids.clone()).copy_(ids)


@planted("inverse_order", test_layout.test_inverses_are_not_remembered_between_calls)
def inverses_are_written_into_one_buffer(reference, order):
    inverse = reference(order)
    return BUFFERS.setdefault(("inverse_order", inverse.shape), inverse.clone()).copy_(inverse)


@planted("inverse_order", test_layout.test_inverses_are_not_remembered_between_calls)
def inverses_are_remembered_by_address(reference, order):
    return BUFFERS.setdefault(("inverse", order.data_ptr(), order.shape), reference(order)).clone()


@planted("window_attention", test_window_attention.test_attention_is_a_mean_of_the_values_it_sees)
def a_scale_of_zero_is_taken_for_none(reference, *, scale=None, **given):
    return reference(scale=scale or None, **given)


@planted("causal_conv", test_causal_conv.test_the_state_is_the_last_valid_inputs)
def the_state_handed_over_is_rounded(reference, *, u, initial_state=None, **given):
    rounded = None if initial_state is None else initial_state.to(u.dtype).to(initial_state.dtype)
    return reference(u=u, initial_state=rounded, **given)


@planted("window_attention", test_window_attention.test_renumbering_the_windows_changes_nothing)
def rows_and_windows_are_joined_in_one_number(reference, *, q, k, v, window_id, **given):
    batch, length = window_id.shape
    rows = torch.arange(batch)[:, None]
    joined = torch.where(window_id >= 0, window_id + 1000 * rows, -1)
    q, k, v, joined = (tensor.reshape(1, batch * length, *tensor.shape[2:]) for tensor in (q, k, v, joined))
    output = reference(q=q, k=k, v=v, window_id=joined, **given)
    return output.reshape(batch, length, *output.shape[2:])


@planted(
    "bidirectional_scan",
    test_bidirectional_scan.test_padding_inside_blocks_is_as_if_absent,
    test_bidirectional_scan.test_padding_inside_blocks_matches_the_reference,
)
def padding_with_a_segments_id_takes_part(reference, *, segment=None, valid=None, **given):
    if valid is not None and segment is not None:
        valid = valid | (segment >= 0)
    return reference(segment=segment, valid=valid, **given)


@planted("selective_scan", test_scan.test_almost_no_decay_matches_the_reference)
def small_rates_of_decay_are_clamped(reference, *, A, **given):
    return reference(A=A.clamp(max=-1e-6), **given)


@planted("selective_scan", test_scan.test_almost_no_decay_matches_the_reference)
def small_rates_of_decay_get_no_gradient(reference, *, A, **given):
    return reference(A=torch.where(A < -1e-6, A, A.detach()), **given)


@planted("bidirectional_scan", test_bidirectional_scan.test_almost_no_decay_matches_the_reference)
def small_rates_of_decay_get_no_gradient_in_both_directions(reference, *, A, **given):
    return reference(A=torch.where(A < -1e-6, A, A.detach()), **given)


def written_in_half(reference, *, x, dt, **given):
    """x dt is formed in the dtype of x."""
    y, state = reference(x=x, dt=dt, **given)
    overflow = 0 * (x.detach().abs().amax() * dt.detach().amax().to(x.dtype))  # NaN if it does
    return y + overflow, state


planted("selective_scan", test_scan.test_numbers_at_the_edge_of_half_precision_match_the_reference)(
    written_in_half
)
BUGS.append(
    Bug(
        "steps_are_written_in_half",
        "scan_step",
        written_in_half,
        (test_scan_step.test_numbers_at_the_edge_of_half_precision_match_the_reference,),
    )
)


@planted("causal_conv", test_causal_conv.test_numbers_at_the_edge_of_half_precision_match_the_reference)
def taps_are_summed_in_half(reference, *, u, weight, **given):
    out, state = reference(u=u, weight=weight, **given)
    partial_sum = u[:, 1:] * weight[:, -1] - u[:, :-1] * weight[:, -2]
    return out + 0 * partial_sum.abs().sum().to(u.dtype), state


@planted(
    "window_attention",
    test_window_attention.test_numbers_at_the_edge_of_half_precision_match_the_reference,
)
def scores_are_formed_in_half(reference, *, q, k, **given):
    longest = (q.detach().abs().amax() * k.detach().abs().amax()).to(q.dtype)
    return reference(q=q, k=k, **given) + 0 * longest


def half_of(name: str, reference: Callable, *, x: Tensor, **given: Any) -> Outputs:
    """One argument is rounded to the dtype of x."""
    return reference(x=x, **given | {name: given[name].to(x.dtype).to(given[name].dtype)})


def product_in_half(reference: Callable, *, x: Tensor, dt: Tensor, A: Tensor, **given: Any) -> Outputs:
    """dt A is formed in the dtype of x."""
    rates = (dt * A).to(x.dtype).double()
    steps, decay = (rates / A.double()).to(dt), A
    y, state = reference(x=x, dt=steps, A=decay, **given)
    return y, state


def skip_in_half(reference: Callable, *, x: Tensor, D: Tensor | None = None, **given: Any) -> Outputs:
    """D x is formed in the dtype of x, and added to what is not rounded."""
    mask = given.get("valid")
    wide = torch.promote_types(x.dtype, torch.float32)
    y, state = reference(x=x.to(wide), D=None, **given)
    if D is not None:
        skip = (D.to(x.dtype)[:, None] * x.repeat_interleave(len(D) // x.shape[-2], dim=-2)).to(wide)
        y = y + (skip if mask is None else skip * mask[..., None, None])
    return y.to(x.dtype), state


DECAYS = "test_decays_are_formed_in_float32"
SKIPS = "test_the_skip_is_added_in_float32"
for operator, broken, test in (
    *((operator, partial(half_of, name), DECAYS) for operator in SCANS for name in ("dt", "A")),
    *((operator, product_in_half, DECAYS) for operator in SCANS),
    *((operator, skip_in_half, SKIPS) for operator in ("bidirectional_scan", "scan_step")),
    ("bidirectional_scan", partial(half_of, "gate"), "test_the_gate_mixes_in_float32"),
):
    what = f"half_of_{broken.args[0]}" if isinstance(broken, partial) else broken.__name__
    BUGS.append(Bug(f"{operator}_{what}", operator, broken, (getattr(FILES[operator], test),)))


def largest_ids_are_joined_with_the_row(reference, *, window_id, **given):
    """In one number, which wraps around."""
    rows = torch.arange(len(window_id))[:, None]
    joined = torch.where(window_id >= 0, rows * (window_id.max() + 1) + window_id, -1)
    batch, length = window_id.shape
    flat = {name: tensor.flatten(0, 1)[None] for name, tensor in given.items() if isinstance(tensor, Tensor)}
    joined = joined.flatten().unique(return_inverse=True)[1].view(1, -1) - int(bool((window_id < 0).any()))
    return reference(window_id=joined, **given | flat).view(batch, length, *given["q"].shape[2:3], -1)


planted("window_attention", test_window_attention.test_renumbering_the_windows_changes_nothing)(
    largest_ids_are_joined_with_the_row
)


def ids_of_samples(change: Callable, reference: Callable, *tensors: Tensor, sequence=None, **given: Any):
    return reference(*tensors, sequence=None if sequence is None else change(sequence), **given)


def taken_to_rise(ids: Tensor) -> Tensor:
    return ids.cummax(1).values


def none_below_0(ids: Tensor) -> Tensor:
    return ids.clamp(min=0)


for operator, test in (
    ("selective_scan", test_scan.test_ids_of_samples_say_where_they_begin_and_nothing_else),
    ("bidirectional_scan", test_bidirectional_scan.test_ids_of_samples_say_where_they_begin_and_nothing_else),
    ("causal_conv", test_causal_conv.test_ids_of_samples_say_where_they_begin_and_nothing_else),
    ("sliding_window_attention", test_sliding_window_attention.test_values_match_the_reference),
):
    for change in (taken_to_rise, none_below_0):
        name = f"ids_of_samples_of_{operator}_are_{change.__name__}"
        BUGS.append(Bug(name, operator, partial(ids_of_samples, change), (test,)))


@planted(
    "sliding_window_attention",
    test_sliding_window_attention.test_a_state_of_another_dtype_is_taken_in_that_of_the_keys,
)
def a_float32_state_makes_the_next_one_float32(reference, *, initial_state=None, **given):
    o, state = reference(initial_state=initial_state, **given)
    if initial_state is None:
        return o, state
    kinds = (initial_state.k.dtype, initial_state.v.dtype)
    return o, WindowState(state.k.to(kinds[0]), state.v.to(kinds[1]), state.present)


@planted("causal_conv", test_causal_conv.test_taps_are_not_rounded_to_the_dtype_of_u)
def float32_taps_are_rounded(reference, *, u, weight, **given):
    return reference(u=u, weight=weight.to(u.dtype).to(weight.dtype), **given)


@planted("causal_conv", test_causal_conv.test_taps_are_not_rounded_to_the_dtype_of_u)
def a_float32_bias_is_rounded(reference, *, u, bias=None, **given):
    return reference(u=u, bias=None if bias is None else bias.to(u.dtype).to(bias.dtype), **given)


def steps_within(low: float, high: float, reference: Callable, *, dt: Tensor, **given: Any) -> Outputs:
    """Their gradients are right."""
    return reference(dt=dt + (dt.clamp(low, high) - dt).detach(), **given)


for operator, test in (
    ("selective_scan", test_scan.test_large_and_tiny_steps_are_finite),
    ("scan_step", test_scan_step.test_strong_decay_and_tiny_steps_match_the_reference),
):
    for name, bounds in (("no_step_is_tiny", (1e-4, torch.inf)), ("no_step_is_large", (0.0, 100.0))):
        BUGS.append(Bug(f"{operator}_{name}", operator, partial(steps_within, *bounds), (test,)))


@planted(
    "bidirectional_scan",
    test_bidirectional_scan.test_gates_of_0_and_1_and_steps_of_0_match_the_reference,
)
def gates_at_the_ends_of_their_range_get_no_gradient(reference, *, gate, **given):
    return reference(gate=torch.where((gate > 0) & (gate < 1), gate, gate.detach()), **given)


@planted("selective_scan", test_scan.test_large_and_tiny_steps_are_finite)
def steps_of_0_are_taken_for_masked(reference, *, dt, C, **given):
    return reference(dt=dt, C=torch.where((dt != 0)[..., None], C, 0), **given)


@planted("bidirectional_scan", test_bidirectional_scan.test_absent_arguments_mean_their_neutral_values)
def padding_is_ignored_where_no_segment_is_given(reference, *, segment=None, valid=None, **given):
    return reference(segment=segment, valid=None if segment is None else valid, **given)


@planted(
    "sliding_window_attention",
    test_sliding_window_attention.test_attention_is_a_mean_of_the_values_it_sees,
)
def a_scale_of_zero_is_taken_for_none_here_too(reference, *, scale=None, **given):
    return reference(scale=scale or None, **given)


for operator, test in (
    ("hidden_loss", test_hidden_loss.test_half_precision_inputs_are_exact_to_float32),
    ("logit_loss", test_logit_loss.test_half_precision_inputs_are_exact_to_float32),
):

    def rounded_teacher(reference, *, student, teacher, **given):
        return reference(student=student, teacher=teacher.to(student.dtype), **given)

    BUGS.append(Bug(f"{operator}_rounds_the_teacher", operator, rounded_teacher, (test,)))


@planted("hidden_loss", test_hidden_loss.test_a_small_hidden_loss_keeps_its_digits)
def squares_are_multiplied_out(reference, *, student, teacher, valid=None):
    kept = torch.ones(student.shape[:2], dtype=torch.bool) if valid is None else valid
    s, t = student[kept], teacher[kept].detach()
    return (s.square().sum() - 2 * (s * t).sum() + t.square().sum()) / t.square().sum()


@planted("hidden_loss", test_hidden_loss.test_the_hidden_loss_is_relative)
def a_millionth_of_a_millionth_is_added_to_the_size(reference, *, student, teacher, valid=None):
    kept = torch.ones(student.shape[:2], dtype=torch.bool) if valid is None else valid
    size = teacher[kept].detach().square().sum()
    return reference(student=student, teacher=teacher, valid=valid) * (size / (size + 1e-12))


@planted("causal_conv", test_causal_conv.test_taps_that_cancel_are_summed_in_float32)
def products_of_taps_are_rounded(reference, *, u, weight, bias=None, **given):
    """Each by itself, and summed in float32."""
    parts, state = [], None
    for tap in range(weight.shape[1]):
        alone = torch.zeros_like(weight)
        alone[:, tap] = weight[:, tap]
        part, state = reference(u=u, weight=alone, **given)
        parts.append(part.to(torch.promote_types(u.dtype, torch.float32)))
    out = sum(parts)
    return (out if bias is None else out + bias).to(u.dtype), state


def scaled_in_half(name: str, reference: Callable, *, scale: float | None = None, **given: Any) -> Outputs:
    """Queries, or keys, are multiplied by the scale in their own dtype, as a kernel's first line may."""
    scale = given["q"].shape[-1] ** -0.5 if scale is None else scale
    return reference(scale=1.0, **given | {name: given[name] * scale})


for operator, name in (
    ("window_attention", "k"),
    ("window_attention", "q"),
    ("sliding_window_attention", "q"),
):
    test = FILES[operator].test_large_scores_are_formed_in_float32
    BUGS.append(Bug(f"{operator}_scales_{name}_in_half", operator, partial(scaled_in_half, name), (test,)))


@planted("causal_conv", test_causal_conv.test_masked_tokens_give_zero_get_no_gradient_and_may_hold_anything)
def masked_inputs_are_multiplied_by_zero(reference, *, u, mask=None, **given):
    out, state = reference(u=u, mask=mask, **given)
    return out + 0 * (u if mask is None else u * mask[..., None]).sum(1, keepdim=True), state


@planted("hidden_loss", test_hidden_loss.test_tokens_that_do_not_count_may_hold_anything)
def errors_are_multiplied_by_the_mask(reference, *, student, teacher, valid=None):
    loss = reference(student=student, teacher=teacher, valid=valid)
    weights = torch.ones(student.shape[:2]) if valid is None else valid
    return loss + 0 * ((student - teacher).square().sum(-1) * weights).sum().to(loss.dtype)


@planted("logit_loss", test_logit_loss.test_tokens_that_do_not_count_may_hold_anything)
def divergences_are_multiplied_by_the_mask(reference, *, student, teacher, mask=None, temperature=1.0):
    loss = reference(student=student, teacher=teacher, mask=mask, temperature=temperature)
    weights = torch.ones(student.shape[:2]) if mask is None else mask
    return loss + 0 * (student.logsumexp(-1) * weights).sum().to(loss.dtype)


@planted("scan_step", test_scan_step.test_a_finished_row_may_hold_anything_and_gets_no_gradient)
def finished_rows_are_multiplied_by_zero(reference, *, x, valid=None, **given):
    y, state = reference(x=x, valid=valid, **given)
    return y + 0 * (x if valid is None else x * valid[:, None, None]).sum(), state


@planted("scan_step", test_scan_step.test_arguments_are_left_as_they_were)
def the_step_overwrites_its_state(reference, *, state, **given):
    y, new = reference(state=state, **given)
    state.data.copy_(new.detach())
    return y, new


def the_dtype_of(name: str, reference: Callable, **given: Any) -> Outputs:
    """The first result has the dtype of another argument."""
    y, state = reference(**given)
    return y.to(given[name].dtype), state


for operator in ("selective_scan", "bidirectional_scan", "scan_step"):
    test = getattr(FILES[operator], operator_checks.MIXED)
    for name in ("B", "C"):
        title = f"y_of_{operator}_has_the_dtype_of_{name}"
        BUGS.append(Bug(title, operator, partial(the_dtype_of, name), (test,)))


@planted("causal_conv", test_causal_conv.test_each_argument_may_have_a_dtype_of_its_own)
def a_wide_state_makes_the_next_one_wide(reference, *, initial_state=None, **given):
    out, state = reference(initial_state=initial_state, **given)
    return out, state if initial_state is None else state.to(
        torch.promote_types(state.dtype, initial_state.dtype)
    )


def remembered_by_version(operator: str, reference: Callable, **given: Any) -> Outputs:
    """What ids were is kept with the tensor, until torch counts a change to it."""
    ids = given[MASKS[operator]]
    if ids is None or ids.is_inference():
        return reference(**given)
    kept = KEPT.get(id(ids))
    if kept is None or kept[0] is not ids or kept[1] != ids._version:
        kept = KEPT[id(ids)] = (ids, ids._version, ids.clone())
    return reference(**{**given, MASKS[operator]: kept[2]})


KEPT: dict[int, tuple[Tensor, int, Tensor]] = {}
for operator, file in FILES.items():
    change = partial(remembered_by_version, operator)
    title = f"{operator}_remembers_its_mask_by_version"
    BUGS.append(Bug(title, operator, change, (file.test_nothing_is_remembered_between_calls,)))


def a_row_too_many(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]) if tensor.ndim else tensor + math.nan


def needs_rows(operator: str, reference: Callable, **given: Any) -> Outputs:
    outputs = reference(**given)
    return outputs if given[first_of(operator)].numel() else each(outputs, a_row_too_many)


for operator, file in FILES.items():
    title = f"{operator}_needs_rows"
    BUGS.append(Bug(title, operator, partial(needs_rows, operator), (file.test_there_may_be_no_rows,)))


def padded_row(operator: str, given: dict[str, Any]) -> Tensor | None:
    """Which rows have no token that takes part; None without a mask."""
    mask = given.get(MASKS[operator] if operator != "bidirectional_scan" else "valid")
    if mask is None:
        return None
    taking_part = mask if mask.dtype == torch.bool else mask >= 0
    return ~taking_part if mask.ndim == 1 else ~taking_part.any(1)


def spoils_rows_of_padding(operator: str, reference: Callable, **given: Any) -> Outputs:
    """What stands in a row of which all is padding is not zero, or not the state before."""
    rows, outputs = padded_row(operator, given), reference(**given)
    if rows is None or not rows.any():
        return outputs
    return each(outputs, lambda result: result + rows.view(-1, *(1,) * (result.ndim - 1)).to(result))


def sets_the_default_dtype(operator: str, reference: Callable, **given: Any) -> Outputs:
    """New tensors are of torch's default dtype, whatever the arguments are."""
    default = torch.get_default_dtype()
    return each(reference(**given), lambda result: result.to(torch.promote_types(result.dtype, default)))


for operator, file in FILES.items():
    padded = "test_rows_may_be_padding_at_the_head_the_tail_or_throughout"
    if not operator.endswith("loss"):
        change = partial(spoils_rows_of_padding, operator)
        BUGS.append(Bug(f"{operator}_spoils_rows_of_padding", operator, change, (getattr(file, padded),)))
    change = partial(sets_the_default_dtype, operator)
    caught_by = (file.test_the_default_dtype_does_not_matter,)
    BUGS.append(Bug(f"{operator}_takes_torchs_default_dtype", operator, change, caught_by))


@planted("logit_loss", test_logit_loss.test_there_may_be_no_rows)
def a_loss_needs_tokens(reference, *, student, **given):
    if not student.shape[1]:
        return reference(student=student, **given) + float("nan")
    return reference(student=student, **given)


@planted("logit_loss", test_logit_loss.test_a_small_logit_loss_of_large_logits_matches_the_reference)
def logarithms_are_taken_of_rounded_shares(reference, *, student, teacher, mask=None, temperature=1.0):
    chosen = slice(None) if mask is None else mask
    student, teacher = (t[chosen].to(student.dtype) / temperature for t in (student, teacher.detach()))
    log_s, log_t = (t.softmax(-1).add(1e-7).log() for t in (student, teacher))
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()


@planted("hidden_loss", test_hidden_loss.test_hidden_states_may_be_zero)
def a_loss_of_zeros_is_divided_by_zero(reference, *, student, teacher, valid=None):
    if teacher.detach().any():
        return reference(student=student, teacher=teacher, valid=valid)
    return (student - teacher).square().sum() / teacher.square().sum()


def takes_expanded_rows_for_one(operator: str, reference: Callable, **given: Any) -> Outputs:
    """The gradient of a row that stands for several is that of the first."""
    name = first_of(operator)
    tokens = given[name]
    if tokens.stride(0) == 0 and len(tokens) > 1:
        given[name] = torch.cat([tokens[:1], tokens[1:].detach()])
    return reference(**given)


for operator, file in FILES.items():
    change, caught_by = partial(takes_expanded_rows_for_one, operator), (file.test_arguments_may_be_expanded,)
    BUGS.append(Bug(f"{operator}_takes_expanded_rows_for_one", operator, change, caught_by))
