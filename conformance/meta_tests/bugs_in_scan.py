"""Broken scans of one direction and broken steps, and the properties that must notice.

A bug receives the reference's operator first, then the arguments of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..properties import test_scan as one
from ..properties import test_scan_step as step
from .planting import grow, per_head, planted


@planted("selective_scan", one.test_a_scan_without_decay_is_a_running_sum)
def the_output_misses_the_tokens_own_write(reference, x, dt, A, B, C, *, mask=None, **rest):
    y, state = reference(x, dt, A, B, C, mask=mask, **rest)
    own = (dt * (C * per_head(B, C)).sum(-1))[..., None] * per_head(x, C)
    return y - (own if mask is None else own * mask[..., None, None]).to(y.dtype), state


@planted("selective_scan", one.test_strong_decay_is_finite_and_forgets_everything)
def the_decay_hits_the_write_too(reference, x, dt, A, B, C, **rest):
    x, B = per_head(x, C), per_head(B, C)
    return reference((x * (dt * A).exp()[..., None]).to(x.dtype), dt, A, B, C, **rest)


@planted("selective_scan", one.test_values_match_the_reference)
def the_decay_is_off_by_a_thousandth(reference, x, dt, A, B, C, **rest):
    return reference(x, dt, A * 1.001, B, C, **rest)


@planted("selective_scan", one.test_masked_tokens_are_as_if_absent)
def the_mask_is_ignored(reference, x, dt, A, B, C, *, mask=None, **rest):
    return reference(x, dt, A, B, C, **rest)


@planted("selective_scan", one.test_masked_tokens_are_as_if_absent)
def masked_tokens_still_decay_the_state(reference, x, dt, A, B, C, *, mask=None, **rest):
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    y, state = reference(x * mask[..., None, None], dt, A, B, C, **rest)
    return y * mask[..., None, None], state


@planted("selective_scan", one.test_masked_tokens_give_zero_and_get_no_gradient)
def masked_tokens_still_read_the_state(reference, x, dt, A, B, C, *, mask=None, **rest):
    return reference(x, dt if mask is None else dt * mask[..., None], A, B, C, **rest)


@planted("selective_scan", one.test_masked_tokens_may_hold_anything)
def masking_multiplies_by_zero(reference, x, dt, A, B, C, *, mask=None, **rest):
    if mask is not None:
        x, B, dt = x * mask[..., None, None], B * mask[..., None, None], dt * mask[..., None]
        C = C * mask[..., None, None]
    return reference(x, dt, A, B, C, **rest)


@planted(
    "selective_scan",
    one.test_reverse_scan_never_sees_the_past,
    one.test_reversal_equals_flipping_the_sequence,
)
def reverse_is_ignored(reference, *tensors, reverse=False, **rest):
    return reference(*tensors, **rest)


@planted("selective_scan", one.test_reversal_equals_flipping_the_sequence)
def the_reverse_output_stays_mirrored(reference, *tensors, reverse=False, **rest):
    y, state = reference(*tensors, reverse=reverse, **rest)
    return (y.flip(1) if reverse else y), state


@planted("selective_scan", one.test_forward_scan_never_sees_the_future)
def the_scan_runs_both_ways(reference, *tensors, reverse=False, **rest):
    y, state = reference(*tensors, reverse=reverse, **rest)
    return y + 0.01 * reference(*tensors, reverse=not reverse, **rest)[0], state


@planted("selective_scan", one.test_no_gradient_of_an_output_reaches_a_later_token)
def only_the_gradient_sees_the_future(reference, x, *tensors, **rest):
    y, state = reference(x, *tensors, **rest)
    total = x.sum((1, 2, 3))[:, None, None, None]
    return y + 0.01 * (total - total.detach()).to(y.dtype), state


@planted("selective_scan", one.test_splitting_anywhere_changes_nothing)
def the_initial_state_is_ignored(reference, *tensors, initial_state=None, **rest):
    return reference(*tensors, **rest)


@planted("selective_scan", one.test_splitting_anywhere_changes_nothing)
def the_initial_state_does_not_decay(reference, x, dt, A, B, C, *, initial_state=None, **rest):
    y, state = reference(x, dt, A, B, C, **rest)
    if initial_state is not None:
        y = y + torch.einsum("blhn,bhnp->blhp", C.to(initial_state), initial_state).to(y.dtype)
        state = state + initial_state
    return y, state


@planted("selective_scan", one.test_gradients_match_the_reference)
def the_initial_state_gets_no_gradient(reference, *tensors, initial_state=None, **rest):
    return reference(
        *tensors, initial_state=None if initial_state is None else initial_state.detach(), **rest
    )


@planted("selective_scan", one.test_splitting_anywhere_changes_nothing)
def the_final_state_passes_no_gradient_on(reference, *tensors, **rest):
    y, state = reference(*tensors, **rest)
    return y, state.detach()


@planted("selective_scan", one.test_gradients_match_the_reference)
def the_step_gets_no_gradient_through_the_decay(reference, x, dt, A, B, C, **rest):
    x, B, fixed = per_head(x, C), per_head(B, C), dt.detach()
    return reference(x, fixed, A, (B * (dt / fixed)[..., None]).to(B.dtype), C, **rest)


@planted("selective_scan", one.test_gradients_match_the_reference)
def the_gradient_of_the_decay_rate_is_doubled(reference, x, dt, A, B, C, **rest):
    return reference(x, dt, grow(A, 2), B, C, **rest)


@planted("selective_scan", one.test_gradients_match_the_reference)
def the_gradient_of_the_reads_is_one_per_cent_short(reference, x, dt, A, B, C, **rest):
    return reference(x, dt, A, B, grow(C, 0.99), **rest)


@planted("selective_scan", one.test_gradients_match_the_reference)
def the_gradient_of_the_last_token_is_lost(reference, x, *tensors, **rest):
    return reference(torch.cat([x[:, :-1], x[:, -1:].detach()], dim=1), *tensors, **rest)


@planted("selective_scan", one.test_decays_are_formed_in_float32)
def the_backward_pass_rounds_the_steps(reference, x, dt, *tensors, **rest):
    right = reference(x, dt, *tensors, **rest)
    coarse = reference(x, dt.to(x.dtype).to(dt.dtype), *tensors, **rest)
    return tuple(value.detach() + (of - of.detach()) for value, of in zip(right, coarse, strict=True))


@planted("selective_scan", one.test_groups_equal_repeated_heads)
def only_the_first_head_of_a_group_sends_a_gradient(reference, x, dt, A, B, C, **rest):
    ratio, x, B = C.shape[2] // x.shape[2], per_head(x, C), per_head(B, C)
    first = (torch.arange(C.shape[2]) % ratio == 0)[:, None]
    return reference(torch.where(first, x, x.detach()), dt, A, torch.where(first, B, B.detach()), C, **rest)


@planted("selective_scan", one.test_groups_equal_repeated_heads)
def heads_read_group_h_modulo_g(reference, x, dt, A, B, C, **rest):
    ratio = C.shape[2] // x.shape[2]
    return reference(x.repeat(1, 1, ratio, 1), dt, A, B.repeat(1, 1, ratio, 1), C, **rest)


@planted("selective_scan", one.test_values_match_the_reference)
def the_state_is_rounded_to_bfloat16_after_every_token(
    reference, x, dt, A, B, C, *, mask=None, initial_state=None, **rest
):
    tokens = range(x.shape[1])[:: -1 if rest.get("reverse") else 1]
    state, outputs = initial_state, {}
    for t in tokens:
        now = slice(t, t + 1)
        masked = None if mask is None else mask[:, now]
        y, state = reference(x[:, now], dt[:, now], A, B[:, now], C[:, now], mask=masked, initial_state=state)
        state, outputs[t] = state.bfloat16().to(state.dtype), y
    return torch.cat([outputs[t] for t in sorted(outputs)], dim=1), state


@planted("selective_scan", one.test_values_match_the_reference)
def the_output_is_always_float32(reference, *tensors, **rest):
    y, state = reference(*tensors, **rest)
    return y.float(), state


@planted("selective_scan", one.test_values_match_the_reference)
def the_final_state_has_the_dtype_of_the_input(reference, x, *tensors, **rest):
    y, state = reference(x, *tensors, **rest)
    return y, state.to(x.dtype)


@planted("selective_scan", one.test_long_scans_match_the_reference)
def the_state_is_lost_after_sixteen_tokens(reference, x, dt, A, B, C, *, mask=None, **rest):
    if x.shape[1] <= 16 or rest.get("reverse"):
        return reference(x, dt, A, B, C, mask=mask, **rest)
    masks = (None, None) if mask is None else (mask[:, :16], mask[:, 16:])
    first, _ = reference(x[:, :16], dt[:, :16], A, B[:, :16], C[:, :16], mask=masks[0], **rest)
    rest.pop("initial_state", None)
    second, state = reference(x[:, 16:], dt[:, 16:], A, B[:, 16:], C[:, 16:], mask=masks[1], **rest)
    return torch.cat([first, second], dim=1), state


@planted("selective_scan", one.test_values_match_the_reference)
def the_last_token_beyond_a_multiple_of_eight_is_not_written(reference, *tensors, **rest):
    y, state = reference(*tensors, **rest)
    ragged = y.shape[1] % 8 == 1
    return (torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], dim=1) if ragged else y), state


@planted("selective_scan", one.test_the_result_does_not_depend_on_the_batch)
def all_rows_take_the_steps_of_the_first(reference, x, dt, *tensors, **rest):
    return reference(x, dt[:1].expand_as(dt), *tensors, **rest)


@planted("selective_scan", one.test_the_result_does_not_depend_on_the_batch)
def all_rows_take_the_mask_of_the_first(reference, *tensors, mask=None, **rest):
    return reference(*tensors, mask=None if mask is None else mask[:1].expand_as(mask), **rest)


@planted("selective_scan", one.test_strong_decay_is_finite_and_forgets_everything)
def strong_decay_gives_infinity_times_zero(reference, x, dt, A, B, C, **rest):
    y, state = reference(x, dt, A, B, C, **rest)
    growth = (-dt.float() * A.float()).exp()[..., None]  # what a cumulative product is divided by
    return y * (growth / growth).to(y.dtype), state


@planted("selective_scan", one.test_strides_do_not_matter)
def strides_are_taken_for_contiguous(reference, x, dt, *tensors, **rest):
    return reference(x, dt.as_strided(dt.shape, torch.empty(dt.shape).stride()), *tensors, **rest)


@planted("selective_scan", one.test_arguments_are_left_as_they_were)
def the_steps_are_scaled_in_place(reference, x, dt, A, *tensors, **rest):
    result = reference(x, dt, A, *tensors, **rest)
    dt.data.mul_(1.5)
    return result


@planted("selective_scan", one.test_uninitialised_memory_is_never_read)
def a_workspace_is_not_cleared(reference, x, *tensors, **rest):
    y, state = reference(x, *tensors, **rest)
    workspace = torch.empty(y.shape, dtype=y.dtype)
    return y + torch.zeros_like(workspace) * workspace, state


@planted("selective_scan", one.test_autocast_changes_nothing)
def autocast_rounds_the_inputs(reference, x, dt, *tensors, **rest):
    dt = dt.bfloat16().to(dt.dtype) if torch.is_autocast_enabled("cpu") else dt
    return reference(x, dt, *tensors, **rest)


@planted("selective_scan", one.test_one_gradient_alone_equals_its_share_of_all)
def gradients_come_only_when_x_needs_one(reference, *, x, dt, A, B, C, **rest):
    rest |= {"dt": dt, "A": A, "B": B, "C": C}
    floats = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
    return reference(x=x, **(rest if x.requires_grad else rest | {k: v.detach() for k, v in floats.items()}))


@planted("scan_step", step.test_step_of_a_finished_row_keeps_its_state, step.test_steps_equal_the_scan)
def a_finished_row_goes_on(reference, *tensors, valid=None, **rest):
    return reference(*tensors, **rest)


@planted("scan_step", step.test_step_matches_its_formula)
def the_step_leaves_out_the_skip(reference, *tensors, D=None, **rest):
    return reference(*tensors, **rest)


@planted("scan_step", step.test_steps_equal_the_scan)
def the_step_keeps_its_state_in_bfloat16(reference, *tensors, **rest):
    y, state = reference(*tensors, **rest)
    return y, state.bfloat16().to(state.dtype)


@planted("scan_step", step.test_step_matches_its_formula, step.test_steps_equal_the_scan)
def the_step_reads_before_it_writes(reference, state, x, dt, A, B, C, **rest):
    y, new_state = reference(state, x, dt, A, B, C, **rest)
    own = (dt * (C * per_head(B[:, None], C[:, None])[:, 0]).sum(-1))[..., None]
    return (y - own * per_head(x[:, None], C[:, None])[:, 0]).to(y.dtype), new_state


@planted("scan_step", step.test_steps_equal_the_prefill_of_text)
def the_step_starts_from_the_wrong_row(reference, state, *tensors, **rest):
    return reference(state.roll(1, 0), *tensors, **rest)
