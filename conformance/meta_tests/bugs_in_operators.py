"""Broken convolutions, windows, layouts and losses, and the properties that must notice.

A bug receives the reference's operator first, then the arguments of a call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..properties import test_causal_conv as conv
from ..properties import test_hidden_loss as hidden
from ..properties import test_layout as layout
from ..properties import test_logit_loss as logit
from ..properties import test_window_attention as windows
from .planting import BUGS, Bug, grow, planted


@planted("causal_conv", conv.test_masked_tokens_are_as_if_absent)
def masked_tokens_are_taken_for_zeros(reference, u, weight, bias=None, *, mask=None, **rest):
    if mask is None:
        return reference(u, weight, bias, **rest)
    out, state = reference(u * mask[..., None], weight, bias, **rest)
    return out * mask[..., None], state


@planted("causal_conv", conv.test_masked_tokens_give_zero_get_no_gradient_and_may_hold_anything)
def the_bias_is_added_to_masked_tokens(reference, u, weight, bias=None, *, mask=None, **rest):
    out, state = reference(u, weight, bias, mask=mask, **rest)
    return (out if bias is None or mask is None else torch.where(mask[..., None], out, bias)), state


@planted("causal_conv", conv.test_a_last_tap_of_one_is_the_identity)
def the_first_tap_meets_the_current_token(reference, u, weight, bias=None, **rest):
    return reference(u, weight.flip(1), bias, **rest)


@planted("causal_conv", conv.test_the_state_is_the_last_valid_inputs)
def the_state_is_newest_first(reference, *tensors, **rest):
    out, state = reference(*tensors, **rest)
    return out, state.flip(1)


@planted(
    "causal_conv", conv.test_the_state_is_the_last_valid_inputs, conv.test_splitting_anywhere_changes_nothing
)
def a_short_piece_forgets_the_state_before_it(reference, u, weight, bias=None, *, initial_state=None, **rest):
    out, state = reference(u, weight, bias, initial_state=initial_state, **rest)
    short = u.shape[1] < weight.shape[1] - 1
    return out, (reference(u, weight, bias, **rest)[1] if short else state)


@planted("causal_conv", conv.test_the_state_is_the_last_valid_inputs)
def the_state_has_the_dtype_of_the_input(reference, u, *tensors, **rest):
    out, state = reference(u, *tensors, **rest)
    return out, state.to(u.dtype)


@planted("causal_conv", conv.test_gradients_match_the_reference)
def the_gradient_of_the_taps_is_one_per_cent_long(reference, u, weight, bias=None, **rest):
    return reference(u, grow(weight, 1.01), bias, **rest)


@planted("causal_conv", conv.test_gradients_match_the_reference)
def an_activation_follows_the_convolution(reference, *tensors, **rest):
    out, state = reference(*tensors, **rest)
    return F.silu(out), state


@planted("window_attention", windows.test_a_token_sees_all_of_its_window_and_nothing_else)
def windows_are_causal(reference, q, k, v, window_id, **rest):
    outputs = [
        reference(q[:, : t + 1], k[:, : t + 1], v[:, : t + 1], window_id[:, : t + 1], **rest)
        for t in range(q.shape[1])
    ]
    return torch.cat([output[:, -1:] for output in outputs], dim=1)


@planted("window_attention", windows.test_other_windows_do_not_matter)
def neighbouring_windows_are_merged(reference, q, k, v, window_id, **rest):
    return reference(q, k, v, window_id.div(2, rounding_mode="floor"), **rest)


@planted("window_attention", windows.test_tokens_in_no_window_give_zero_and_get_no_gradient)
def text_is_a_window_of_its_own(reference, q, k, v, window_id, **rest):
    return reference(q, k, v, window_id + 1, **rest)


@planted("window_attention", windows.test_the_default_scale_is_one_over_the_root_of_the_head_dim)
def the_scale_is_left_out(reference, *tensors, scale=None, **rest):
    return reference(*tensors, scale=1.0 if scale is None else scale, **rest)


@planted("window_attention", windows.test_large_scores_are_finite)
def the_softmax_does_not_subtract_its_maximum(reference, q, k, v, window_id, *, scale=None):
    output = reference(q, k, v, window_id, scale=scale)
    ratio = q.shape[2] // k.shape[2]
    scores = torch.einsum("blhn,blhn->blh", q, k.repeat_interleave(ratio, 2)) * (
        q.shape[3] ** -0.5 if scale is None else scale
    )
    own = scores.float().exp()[..., None]
    return output * (own / own).to(output.dtype)


@planted("window_attention", windows.test_groups_equal_repeated_heads)
def attention_heads_read_group_h_modulo_g(reference, q, k, v, window_id, **rest):
    ratio = q.shape[2] // k.shape[2]
    return reference(q, k.repeat(1, 1, ratio, 1), v.repeat(1, 1, ratio, 1), window_id, **rest)


@planted("window_attention", windows.test_the_result_does_not_depend_on_the_batch)
def all_rows_have_the_windows_of_the_first(reference, q, k, v, window_id, **rest):
    return reference(q, k, v, window_id[:1].expand_as(window_id), **rest)


@planted("window_attention", windows.test_gradients_match_the_reference)
def the_keys_get_no_gradient(reference, q, k, v, window_id, **rest):
    return reference(q, k.detach(), v, window_id, **rest)


@planted("window_attention", windows.test_gradients_match_the_reference)
def the_last_token_of_the_row_is_in_no_window(reference, q, k, v, window_id, **rest):
    last = torch.arange(q.shape[1]) == q.shape[1] - 1
    return reference(q, k, v, window_id.masked_fill(last, -1), **rest)


@planted("window_attention", windows.test_nothing_is_remembered_between_calls)
def windows_are_remembered_by_their_tensor(reference, q, k, v, window_id, **rest):
    remembered = window_id.__dict__.setdefault("remembered", window_id.clone())
    return reference(q, k, v, remembered, **rest)


@planted("window_attention", windows.test_renumbering_the_windows_changes_nothing)
def window_ids_index_a_small_table(reference, q, k, v, window_id, **rest):
    return reference(q, k, v, window_id.clamp(max=4096), **rest)


@planted(
    "scan_order",
    layout.test_scan_order_equals_sorting_plain_tuples,
    layout.test_scan_order_sorts_by_the_axes_of_its_layer,
)
def the_orders_come_one_layer_late(reference, coords, layer_index):
    return reference(coords, layer_index + 3)


@planted("scan_order", layout.test_scan_order_equals_sorting_plain_tuples)
def the_inverse_is_returned_for_the_order(reference, coords, layer_index):
    return reference(coords, layer_index).argsort(1)


@planted("scan_order", layout.test_scan_order_equals_sorting_plain_tuples)
def the_last_of_two_tokens_in_a_cell_comes_first(reference, coords, layer_index):
    order = reference(coords, layer_index)
    scanned = coords.gather(1, order[..., None].expand_as(coords))
    ties = (scanned[:, 1:] == scanned[:, :-1]).all(-1) & (scanned[:, 1:, 0] >= 0)
    for row, place in ties.nonzero().tolist():
        order[row, place : place + 2] = order[row, place : place + 2].flip(0)
    return order


@planted("scan_order", layout.test_scan_order_is_a_permutation_that_leaves_text_and_segments_in_place)
def text_between_rows_moves_with_the_segment(reference, coords, layer_index):
    text = (coords[..., :1] < 0).all(1, keepdim=True)
    order = reference(coords, layer_index)
    return torch.where(text[..., 0], order, order.sort(1, descending=True).indices)


@planted("scan_order", layout.test_scan_order_does_not_depend_on_how_a_segment_is_stored)
def the_first_order_is_taken_for_the_stored_one(reference, coords, layer_index):
    stored = torch.arange(coords.shape[1]).expand(coords.shape[:2]).contiguous()
    return stored if layer_index % 4 == 0 else reference(coords, layer_index)


@planted("inverse_order", layout.test_order_then_inverse_is_identity)
def the_order_is_taken_for_its_own_inverse(reference, order):
    return order


@planted("window_ids", layout.test_windows_equal_their_definition_pair_by_pair)
def no_layer_is_shifted(reference, coords, window_thw, shifted):
    return reference(coords, window_thw, False)


@planted("window_ids", layout.test_windows_equal_their_definition_pair_by_pair)
def short_axes_are_shifted_too(reference, coords, window_thw, shifted):
    moved = torch.tensor([0, *(w // 2 if shifted else 0 for w in window_thw)])
    return reference(torch.where(coords >= 0, coords + moved, coords), window_thw, False)


@planted("window_ids", layout.test_windows_are_local)
def shifted_windows_wrap_around(reference, coords, window_thw, shifted):
    segment, cells = coords[..., 0], coords[..., 1:]
    mates = segment[:, :, None] == segment[:, None, :]
    extent = torch.where(mates[..., None], cells[:, None] + 1, 1).amax(2).clamp(min=1)
    size = torch.tensor(window_thw)
    moved = (cells + torch.where(extent > size, size // 2, 0) * shifted) % extent
    moved = torch.where(segment[..., None] >= 0, moved, cells)
    return reference(torch.cat([coords[..., :1], moved], dim=-1), window_thw, False)


@planted("window_ids", layout.test_windows_are_local)
def windows_reach_from_one_segment_into_the_next(reference, coords, window_thw, shifted):
    return reference(torch.cat([coords[..., :1].clamp(max=0), coords[..., 1:]], dim=-1), window_thw, shifted)


@planted("hidden_loss", hidden.test_saying_everything_twice_changes_nothing)
def the_hidden_loss_is_a_sum(reference, student, teacher, valid=None):
    return reference(student, teacher, valid) * student.shape[0] * student.shape[1]


@planted("hidden_loss", hidden.test_tokens_that_do_not_count_change_nothing)
def the_hidden_loss_counts_padding(reference, student, teacher, valid=None):
    return reference(student, teacher)


@planted("hidden_loss", hidden.test_the_hidden_loss_is_relative)
def the_hidden_loss_is_absolute(reference, student, teacher, valid=None):
    return reference(student, teacher, valid) * teacher.square().mean()


@planted("hidden_loss", hidden.test_no_gradient_reaches_the_teacher)
def the_teacher_is_trained(reference, student, teacher, valid=None):
    return reference(student, teacher, valid) + 0 * student.sum() + (teacher - teacher.detach()).sum()


@planted("hidden_loss", hidden.test_the_student_says_the_dtype_of_the_loss)
def the_loss_has_the_wider_dtype_of_the_two(reference, student, teacher, valid=None):
    loss = reference(student, teacher, valid)
    return loss.to(torch.promote_types(loss.dtype, teacher.dtype))


@planted("logit_loss", logit.test_half_precision_inputs_are_exact_to_float32)
def the_softmax_is_taken_in_half_precision(reference, student, teacher, mask=None, temperature=1.0):
    rounded = student.float().log_softmax(-1).to(student.dtype)
    return reference(rounded, teacher, mask, temperature)


@planted("logit_loss", logit.test_saying_everything_twice_changes_nothing)
def the_logit_loss_is_divided_by_the_batch_only(reference, student, teacher, mask=None, temperature=1.0):
    tokens = student.shape[1] if mask is None else int(mask.sum()) / mask.shape[0]
    return reference(student, teacher, mask, temperature) * tokens


@planted("logit_loss", logit.test_the_logit_loss_goes_from_teacher_to_student)
def the_divergence_runs_from_student_to_teacher(reference, student, teacher, mask=None, temperature=1.0):
    loss = reference(teacher, student, mask, temperature)
    return loss + 0 * student.sum()


@planted("logit_loss", logit.test_the_logit_loss_goes_from_teacher_to_student)
def the_temperature_is_not_squared(reference, student, teacher, mask=None, temperature=1.0):
    return reference(student, teacher, mask, temperature) / temperature


@planted("logit_loss", logit.test_tokens_that_do_not_count_change_nothing)
def the_logit_loss_averages_over_all_tokens(reference, student, teacher, mask=None, temperature=1.0):
    share = 1.0 if mask is None else mask.float().mean().item()
    return reference(student, teacher, mask, temperature) * share


def a_gradient_is_rounded_before_it_is_scaled(reference, student, *rest, **options):
    leaf = student.detach().requires_grad_()
    with torch.enable_grad():
        loss = reference(leaf, *rest, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)  # in the dtype of the student
    return loss.detach() + ((student - student.detach()).to(loss.dtype) * gradient).sum()


for target, tests in (("hidden_loss", hidden), ("logit_loss", logit)):
    caught_by = (tests.test_the_gradient_of_a_scaled_loss_is_as_exact_as_its_dtype,)
    name = f"the_gradient_of_{target}_is_rounded_before_it_is_scaled"
    BUGS.append(Bug(name, target, a_gradient_is_rounded_before_it_is_scaled, caught_by))
