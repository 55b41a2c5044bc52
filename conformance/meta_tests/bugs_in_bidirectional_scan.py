"""Broken bidirectional scans, and the properties that must notice.

A bug receives the reference's operator first, then the arguments of a call.
"""

from __future__ import annotations

import torch

from ..properties import test_bidirectional_scan as both
from .planting import per_head, planted, spans_filled


@planted("bidirectional_scan", both.test_an_open_gate_gives_the_forward_scan_alone)
def the_gate_is_swapped(reference, *tensors, gate, **rest):
    return reference(*tensors, gate=1 - gate, **rest)


@planted("bidirectional_scan", both.test_the_gate_mixes_linearly_and_only_on_vision)
def the_gate_acts_on_text_too(reference, *tensors, gate, segment=None, D=None, **rest):
    y, state = reference(*tensors, gate=gate, segment=segment, **rest)
    text = torch.ones(y.shape[:2], dtype=torch.bool) if segment is None else segment < 0
    with_skip, _ = reference(*tensors, gate=gate, segment=segment, D=D, **rest)
    return with_skip - y * ((1 - gate[..., None]) * text[..., None, None]).to(y.dtype), state


@planted(
    "bidirectional_scan",
    both.test_a_shut_gate_gives_one_reverse_scan_per_segment,
    both.test_the_reverse_part_sees_its_own_segment_only,
    both.test_no_token_sees_past_the_end_of_its_block,
)
def the_reverse_scan_is_not_reset_between_segments(reference, *tensors, segment=None, **rest):
    return reference(*tensors, segment=None if segment is None else segment.clamp(max=0), **rest)


@planted("bidirectional_scan", both.test_the_reverse_part_sees_its_own_segment_only)
def text_inside_a_span_is_taken_for_vision(reference, *tensors, segment=None, **rest):
    return reference(*tensors, segment=None if segment is None else spans_filled(segment), **rest)


@planted(
    "bidirectional_scan",
    both.test_no_token_sees_past_the_end_of_its_block,
    both.test_text_never_sees_later_tokens_here,
)
def text_is_scanned_both_ways_as_well(reference, *tensors, segment=None, **rest):
    return reference(*tensors, segment=None if segment is None else segment + 1, **rest)


@planted(
    "bidirectional_scan",
    both.test_a_shut_gate_gives_one_reverse_scan_per_segment,
    both.test_values_match_the_reference,
)
def the_reverse_scan_has_the_wrong_sign(reference, *tensors, gate, segment=None, **rest):
    y, state = reference(*tensors, gate=gate, segment=segment, **rest)
    if segment is None:
        return y, state
    shut, _ = reference(*tensors, gate=torch.zeros_like(gate), segment=segment, **rest | {"D": None})
    part = (1 - gate) * (segment >= 0)[..., None]
    return y - (2 * part[..., None] * shut).to(y.dtype), state


@planted("bidirectional_scan", both.test_a_shut_gate_gives_one_reverse_scan_per_segment)
def the_reverse_scan_misses_the_token_itself(
    reference, x, dt, A, B, C, *, gate, segment=None, valid=None, **rest
):
    y, state = reference(x, dt, A, B, C, gate=gate, segment=segment, valid=valid, **rest)
    vision = torch.zeros_like(y[..., 0, 0]) if segment is None else (segment >= 0).to(y)
    own = (dt * (1 - gate) * (C * per_head(B, C)).sum(-1))[..., None] * per_head(x, C)
    return y - vision[..., None, None] * own.to(y.dtype), state


@planted("bidirectional_scan", both.test_a_shut_gate_gives_one_reverse_scan_per_segment)
def the_reverse_scan_starts_from_the_initial_state(
    reference, x, dt, A, B, C, *, segment=None, initial_state=None, **rest
):
    y, state = reference(x, dt, A, B, C, segment=segment, initial_state=initial_state, **rest)
    if segment is not None and initial_state is not None:
        read = torch.einsum("blhn,bhnp->blhp", C.to(initial_state), initial_state)
        y = y + ((1 - rest["gate"]) * (segment >= 0)[..., None])[..., None].to(y.dtype) * read.to(y.dtype)
    return y, state


@planted("bidirectional_scan", both.test_a_shut_gate_gives_one_reverse_scan_per_segment)
def text_between_frames_decays_the_reverse_state(reference, x, dt, A, B, C, *, segment=None, **rest):
    if segment is None:
        return reference(x, dt, A, B, C, segment=segment, **rest)
    y, state = reference(x, dt, A, B, C, segment=segment, **rest)
    text = (segment < 0)[..., None, None]
    filled = reference(x * ~text, dt, A, B, C, segment=spans_filled(segment), **rest)[0]
    silent = reference(x * ~text, dt, A, B, C, segment=segment, **rest)[0]
    return torch.where(text, y, y + filled - silent), state


@planted(
    "bidirectional_scan",
    both.test_no_token_sees_past_the_end_of_its_block,
    both.test_the_final_state_is_the_forward_one,
)
def the_final_state_holds_the_reverse_scan_too(reference, x, *tensors, **rest):
    y, state = reference(x, *tensors, **rest)
    extra = y.to(state.dtype).mean(1)[:, :, None, :]
    return y + 0.01 * y[:, -1:], state + extra


@planted("bidirectional_scan", both.test_the_skip_adds_d_times_x)
def the_skip_is_left_out_on_text(reference, x, dt, A, B, C, *, segment=None, D=None, **rest):
    y, state = reference(x, dt, A, B, C, segment=segment, D=D, **rest)
    plain, _ = reference(x, dt, A, B, C, segment=segment, **rest)
    text = torch.ones(x.shape[:2], dtype=torch.bool) if segment is None else segment < 0
    return torch.where(text[..., None, None], plain, y), state


@planted("bidirectional_scan", both.test_padding_gives_zero_and_gets_no_gradient)
def the_skip_is_added_on_padding(reference, x, dt, A, B, C, *, D=None, **rest):
    y, state = reference(x, dt, A, B, C, **rest)
    return (y if D is None else (y + D[:, None] * per_head(x, C)).to(y.dtype)), state


@planted("bidirectional_scan", both.test_gradients_match_the_reference)
def the_skip_gets_no_gradient(reference, *tensors, D=None, **rest):
    return reference(*tensors, D=None if D is None else D.detach(), **rest)


@planted("bidirectional_scan", both.test_more_padding_changes_nothing)
def padding_is_scanned_like_text(reference, *tensors, valid=None, **rest):
    y, state = reference(*tensors, **rest)
    return (y if valid is None else y * valid[..., None, None]), state


@planted("bidirectional_scan", both.test_gradients_match_the_reference)
def the_gate_gets_no_gradient(reference, *tensors, gate, **rest):
    return reference(*tensors, gate=gate.detach(), **rest)


@planted("bidirectional_scan", both.test_a_shut_gate_gives_one_reverse_scan_per_segment)
def segment_zero_is_taken_for_text(reference, *tensors, segment=None, **rest):
    return reference(
        *tensors, segment=None if segment is None else segment.masked_fill(segment == 0, -1), **rest
    )


@planted("bidirectional_scan", both.test_the_result_does_not_depend_on_the_batch)
def all_rows_have_the_segments_of_the_first(reference, *tensors, segment=None, **rest):
    return reference(*tensors, segment=None if segment is None else segment[:1].expand_as(segment), **rest)


@planted("bidirectional_scan", both.test_renumbering_the_segments_changes_nothing)
def segment_ids_are_packed_into_a_byte(reference, *tensors, segment=None, **rest):
    return reference(*tensors, segment=None if segment is None else segment.clamp(max=127), **rest)


@planted("bidirectional_scan", both.test_an_open_gate_gives_the_forward_scan_alone)
def the_forward_scan_leaves_out_text(reference, *tensors, segment=None, valid=None, **rest):
    if segment is None:
        return reference(*tensors, segment=segment, valid=valid, **rest)
    vision = segment >= 0 if valid is None else (segment >= 0) & valid
    y, _ = reference(*tensors, segment=segment, valid=vision, **rest)
    whole, state = reference(*tensors, segment=segment, valid=valid, **rest)
    return torch.where(vision[..., None, None], y, whole), state
