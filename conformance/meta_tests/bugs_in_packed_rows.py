"""Broken packed rows: operators and modules that let samples meet, and the properties that must notice.

A bug receives the reference's operator first, then the arguments of a call; or the reference's class.
"""

from __future__ import annotations

from unittest import mock

import torch

from linmu.reference import VisionLayout, local_swin

from ..properties import test_bidirectional_scan as both
from ..properties import test_causal_conv as conv
from ..properties import test_flex_ma as flex
from ..properties import test_local_swin as swin
from ..properties import test_m_mate as mate
from ..properties import test_scan as scan
from ..properties import test_sliding_window_attention as sliding
from .planting import BUGS, Bug, grow, planted


def last_sample(sequence: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: whether a token is of the sample that its row ends with."""
    return (sequence.flip(1) == sequence[:, -1:]).cumprod(1).flip(1).bool()


@planted(
    "selective_scan",
    scan.test_a_packed_row_equals_its_samples_alone,
    scan.test_packed_rows_match_the_reference,
    scan.test_long_packed_rows_equal_their_samples_alone,
    scan.test_long_packed_rows_match_the_reference,
)
def the_scan_crosses_samples(reference, *tensors, sequence=None, **rest):
    return reference(*tensors, **rest)


@planted("selective_scan", scan.test_a_packed_row_equals_its_samples_alone)
def a_sample_of_the_scan_begins_one_token_late(reference, *tensors, sequence=None, **rest):
    late = sequence
    if sequence is not None:
        late = torch.cat([sequence[:, :1], sequence[:, :-1]], dim=1)
    return reference(*tensors, sequence=late, **rest)


@planted("selective_scan", scan.test_a_packed_row_equals_its_samples_alone)
def the_initial_state_is_lost_in_packed_rows(reference, *tensors, sequence=None, initial_state=None, **rest):
    start = initial_state if sequence is None else None
    return reference(*tensors, sequence=sequence, initial_state=start, **rest)


@planted("selective_scan", scan.test_ids_of_samples_say_where_they_begin_and_nothing_else)
def ids_of_samples_are_wrapped_to_32_bits(reference, *tensors, sequence=None, **rest):
    narrow = None if sequence is None else sequence.int().long()
    return reference(*tensors, sequence=narrow, **rest)


@planted("selective_scan", scan.test_ids_of_samples_say_where_they_begin_and_nothing_else)
def samples_begin_at_masked_tokens_too(reference, x, *tensors, mask=None, sequence=None, **rest):
    if mask is None or sequence is None:
        return reference(x, *tensors, mask=mask, sequence=sequence, **rest)
    runs = (sequence.diff(dim=1) != 0).cumsum(1)
    return reference(x, *tensors, mask=mask, sequence=torch.nn.functional.pad(runs, (1, 0)), **rest)


@planted("selective_scan", scan.test_a_row_of_one_sample_is_not_packed)
def a_packed_row_starts_from_nothing(reference, *tensors, initial_state=None, sequence=None, **rest):
    start = None if sequence is not None and initial_state is not None else initial_state
    return reference(*tensors, initial_state=start, sequence=sequence, **rest)


@planted("selective_scan", scan.test_strides_of_packed_rows_do_not_matter)
def ids_are_read_as_if_they_were_contiguous(reference, *tensors, sequence=None, **rest):
    if sequence is not None:
        sequence = sequence.as_strided(sequence.shape, (sequence.shape[1], 1))
    return reference(*tensors, sequence=sequence, **rest)


@planted(
    "bidirectional_scan",
    both.test_a_packed_row_equals_its_samples_alone,
    both.test_packed_rows_match_the_reference,
    both.test_long_packed_rows_equal_their_samples_alone,
)
def both_directions_cross_samples(reference, *tensors, sequence=None, **rest):
    return reference(*tensors, **rest)


@planted("bidirectional_scan", both.test_a_packed_row_equals_its_samples_alone)
def padding_is_a_sample_of_its_own(reference, *tensors, valid=None, sequence=None, **rest):
    y, state = reference(*tensors, valid=valid, sequence=sequence, **rest)
    if valid is None or sequence is None:
        return y, state
    return y, state * valid[:, -1].view(-1, 1, 1, 1)


@planted("bidirectional_scan", both.test_a_packed_row_equals_its_samples_alone)
def all_rows_have_the_samples_of_the_first(reference, *tensors, sequence=None, **rest):
    shared = None if sequence is None else sequence[:1].expand_as(sequence)
    return reference(*tensors, sequence=shared, **rest)


@planted(
    "causal_conv",
    conv.test_a_packed_row_equals_its_samples_alone,
    conv.test_packed_rows_match_the_reference,
)
def taps_reach_into_the_sample_before(reference, *tensors, sequence=None, **rest):
    _, state = reference(*tensors, sequence=sequence, **rest)
    return reference(*tensors, **rest)[0], state


@planted("causal_conv", conv.test_a_packed_row_equals_its_samples_alone)
def the_state_holds_inputs_of_earlier_samples(reference, *tensors, sequence=None, **rest):
    out, _ = reference(*tensors, sequence=sequence, **rest)
    return out, reference(*tensors, **rest)[1]


@planted("causal_conv", conv.test_ids_of_samples_say_where_they_begin_and_nothing_else)
def ids_of_samples_are_made_floats(reference, *tensors, sequence=None, **rest):
    rounded = None if sequence is None else sequence.float().long()
    return reference(*tensors, sequence=rounded, **rest)


@planted("causal_conv", conv.test_a_packed_row_equals_its_samples_alone)
def no_gradient_reaches_the_taps_of_a_later_sample(reference, u, weight, *rest, sequence=None, **named):
    out, state = reference(u, weight, *rest, sequence=sequence, **named)
    if sequence is None:
        return out, state
    own = (last_sample(sequence) & ~last_sample(sequence).all(1, keepdim=True))[..., None]
    return torch.where(own, out.detach(), out), state


@planted("causal_conv", conv.test_the_state_before_is_the_first_samples_in_a_row_shorter_than_the_taps)
def the_state_of_a_short_packed_row_begins_with_the_state_before(reference, u, weight, *rest, **named):
    out, state = reference(u, weight, *rest, **named)
    start, short = named.get("initial_state"), weight.shape[1] - 1 - u.shape[1]
    if start is None or named.get("sequence") is None or named.get("mask") is not None or short <= 0:
        return out, state
    return out, torch.cat([start[:, -short:].to(state), state[:, short:]], dim=1)


def in_a_byte(reference, *tensors, sequence=None, **rest):
    """The number of a sample in its row."""
    if sequence is None:
        return reference(*tensors, **rest)
    runs = torch.nn.functional.pad((sequence.diff(dim=1) != 0).cumsum(1), (1, 0))
    first = runs == 255  # wraps, and is taken for the one before
    return reference(*tensors, sequence=torch.where(first, 254, runs), **rest)


for target, tests in (("selective_scan", scan), ("bidirectional_scan", both), ("causal_conv", conv)):
    caught_by = (tests.test_hundreds_of_samples_equal_as_many_rows,)
    BUGS.append(Bug(f"numbers_of_samples_of_{target}_are_bytes", target, in_a_byte, caught_by))


@planted("sliding_window_attention", sliding.test_hundreds_of_samples_equal_as_many_rows)
def a_window_knows_64_samples(reference, *tensors, sequence=None, **rest):
    if sequence is None:
        return reference(*tensors, **rest)
    runs = torch.nn.functional.pad((sequence.diff(dim=1) != 0).cumsum(1), (1, 0))
    return reference(*tensors, sequence=torch.where(runs >= 64, 63, runs), **rest)


@planted("bidirectional_scan", both.test_padding_with_a_segment_is_still_padding)
def segments_end_at_padding_of_another_one(reference, *tensors, segment=None, valid=None, **rest):
    if segment is None or valid is None:
        return reference(*tensors, segment=segment, valid=valid, **rest)
    ids = segment.clone()
    for row, there in zip(ids, valid, strict=True):
        last, shift = -1, 0
        for t, number in enumerate(row.tolist()):
            if number >= 0 and not there[t] and last not in (-1, number):
                shift += 1000
            last = number if number >= 0 else last
            row[t] = -1 if number < 0 else number - shift if number > 2**62 else number + shift
    return reference(*tensors, segment=ids, valid=valid, **rest)


def unpacked(layout):
    """The layout without its samples."""
    return None if layout is None else VisionLayout(layout.coords)


@planted(
    "FlexMA",
    flex.test_flex_ma_equals_the_samples_of_a_packed_row_alone,
    flex.test_flex_ma_equals_the_samples_of_packed_text_alone,
)
def the_branch_does_not_hear_of_samples(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, sequence=None, **rest):
            return super().forward(hidden_states, unpacked(layout), **rest)

    return Broken


@planted(
    "LocalSwin",
    swin.test_local_swin_equals_the_samples_of_a_packed_row_alone,
    swin.test_local_swin_equals_the_samples_of_packed_text_alone,
)
def the_text_window_crosses_samples(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, sequence=None, **rest):
            return super().forward(hidden_states, unpacked(layout), **rest)

    return Broken


@planted("MMATE", mate.test_m_mate_equals_the_samples_of_packed_text_alone)
def the_block_hears_of_samples_only_from_a_layout(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, sequence=None, **rest):
            return super().forward(hidden_states, layout, **rest)

    return Broken


@planted("MMATE", mate.test_m_mate_equals_the_samples_of_a_packed_row_alone)
def the_block_hears_of_samples_only_without_a_layout(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            return super().forward(hidden_states, unpacked(layout), **rest)

    return Broken


@planted("LocalSwin", swin.test_local_swin_equals_the_samples_of_a_packed_row_alone)
def the_queries_of_packed_text_get_a_little_too_large_a_gradient(reference):
    sound = local_swin.sliding_window_attention

    def attend(q, *rest, sequence=None, **given):
        return sound(q if sequence is None else grow(q, 1.01), *rest, sequence=sequence, **given)

    class Broken(reference):
        def forward(self, *args, **given):
            with mock.patch.object(local_swin, "sliding_window_attention", attend):
                return super().forward(*args, **given)

    return Broken


def joined_at(size, operator, *tensors, sequence=None, **rest):
    """A sample of several tokens that begins where a chunk of `size` does goes on from the one before."""
    if sequence is None or sequence.shape[1] <= size:
        return operator(*tensors, sequence=sequence, **rest)
    numbers = torch.nn.functional.pad((sequence.diff(dim=1) != 0).cumsum(1), (1, 0))
    for start in range(size, sequence.shape[1] - 1, size):
        begins = numbers[:, start] != numbers[:, start - 1]
        longer = numbers[:, start] == numbers[:, start + 1]
        numbers[:, start:] -= (begins & longer).long()[:, None]
    return operator(*tensors, sequence=numbers, **rest)
