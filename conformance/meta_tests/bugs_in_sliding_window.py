"""Broken sliding windows, and the properties that must notice.

A bug receives the sound operator first, then the arguments of a call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..properties import test_sliding_window_attention as sliding
from .planting import grow, planted

TARGET = "sliding_window_attention"


@planted(
    TARGET,
    sliding.test_a_token_reads_the_last_tokens_of_its_row_and_nothing_else,
    sliding.test_gradients_match_the_reference,
)
def the_window_is_one_token_too_long(sound, q, k, v, window, *, initial_state=None, **rest):
    o, _ = sound(q, k, v, window + 1, initial_state=longer(initial_state), **rest)
    return o, sound(q, k, v, window, initial_state=initial_state, **rest)[1]


def longer(state):
    """With a place more, which nobody fills."""
    if state is None:
        return None
    k, v = (F.pad(tensor, (0, 0, 0, 0, 1, 0)) for tensor in state[:2])
    return type(state)(k, v, F.pad(state.present, (1, 0)))


@planted(
    TARGET,
    sliding.test_a_token_reads_the_last_tokens_of_its_row_and_nothing_else,
    sliding.test_gradients_match_the_reference,
)
def the_window_leaves_out_its_last_token(sound, q, k, v, window, **rest):
    o, state = sound(q, k, v, window, **rest)
    if window == 1 or rest.get("initial_state") is not None:
        return o, state
    return sound(q, k, v, window - 1, **rest)[0], state


@planted(
    TARGET,
    sliding.test_an_output_never_depends_on_later_tokens,
    sliding.test_a_token_reads_the_last_tokens_of_its_row_and_nothing_else,
)
def the_next_token_is_seen(sound, q, k, v, window, **rest):
    ahead = (torch.cat([t[:, 1:], t[:, -1:]], dim=1) for t in (k, v))
    return sound(q, *ahead, window, **rest)[0], sound(q, k, v, window, **rest)[1]


@planted(TARGET, sliding.test_padding_anywhere_is_as_if_absent)
def padding_counts_towards_the_window(sound, q, k, v, window, *, valid=None, **rest):
    o, state = sound(q, k, v, window, valid=valid, **rest)
    if valid is None or rest.get("initial_state") is not None:
        return o, state
    outputs = []
    for t in range(q.shape[1]):
        near = slice(max(0, t - window + 1), t + 1)
        masks = {n: m if m is None else m[:, near] for n, m in rest.items() if n in ("asks", "sequence")}
        given = {**rest, **masks, "valid": valid[:, near]}
        outputs.append(sound(q[:, near], k[:, near], v[:, near], window, **given)[0][:, -1:])
    return torch.cat(outputs, dim=1), state


@planted(TARGET, sliding.test_masked_tokens_may_hold_anything)
def padding_is_wiped_by_a_product(sound, q, k, v, window, *, valid=None, **rest):
    o, state = sound(q, k, v, window, valid=valid, **rest)
    wiped = v if valid is None else v * valid[..., None, None]
    return o + 0 * wiped.sum().to(o.dtype), state


@planted(
    TARGET,
    sliding.test_permuting_the_rows_permutes_the_result,
    sliding.test_padding_anywhere_is_as_if_absent,
)
def all_rows_have_the_padding_of_the_first(sound, *tensors, valid=None, **rest):
    valid = None if valid is None else valid[:1].expand_as(valid)
    return sound(*tensors, valid=valid, **rest)


@planted(
    TARGET,
    sliding.test_permuting_the_rows_permutes_the_result,
    sliding.test_gradients_match_the_reference,
)
def a_row_reads_the_state_of_another(sound, *tensors, initial_state=None, **rest):
    if initial_state is not None:
        initial_state = type(initial_state)(*(tensor.roll(1, 0) for tensor in initial_state))
    return sound(*tensors, initial_state=initial_state, **rest)


@planted(
    TARGET,
    sliding.test_a_packed_row_equals_its_samples_alone,
    sliding.test_a_token_reads_the_last_tokens_of_its_row_and_nothing_else,
)
def the_window_reaches_into_the_sequence_before(sound, *tensors, sequence=None, **rest):
    return sound(*tensors, **rest)


@planted(TARGET, sliding.test_a_packed_row_equals_its_samples_alone)
def sequences_are_told_apart_by_32_bits_and_a_thousand(sound, *tensors, sequence=None, **rest):
    sequence = None if sequence is None else sequence // 4000
    return sound(*tensors, sequence=sequence, **rest)


@planted(TARGET, sliding.test_the_state_is_the_last_valid_keys_and_values)
def the_state_keeps_what_was_before_the_last_sequence(sound, *tensors, sequence=None, **rest):
    o, _ = sound(*tensors, sequence=sequence, **rest)
    return o, sound(*tensors, **rest)[1]


@planted(
    TARGET,
    sliding.test_splitting_anywhere_changes_nothing,
    sliding.test_one_token_at_a_time_equals_the_whole,
)
def the_state_is_stale(sound, *tensors, initial_state=None, **rest):
    o, state = sound(*tensors, initial_state=initial_state, **rest)
    return o, state if initial_state is None else initial_state


@planted(TARGET, sliding.test_the_state_is_the_last_valid_keys_and_values)
def a_short_piece_forgets_the_window_before_it(sound, q, k, v, window, *, initial_state=None, **rest):
    o, state = sound(q, k, v, window, initial_state=initial_state, **rest)
    return o, (sound(q, k, v, window, **rest)[1] if q.shape[1] < window - 1 else state)


@planted(TARGET, sliding.test_the_state_is_the_last_valid_keys_and_values)
def the_state_holds_padding(sound, q, k, v, window, *, valid=None, **rest):
    o, _ = sound(q, k, v, window, valid=valid, **rest)
    return o, sound(q, k, v, window, **rest)[1]


@planted(TARGET, sliding.test_the_state_is_the_last_valid_keys_and_values)
def the_state_is_kept_in_float32(sound, *tensors, **rest):
    o, state = sound(*tensors, **rest)
    return o, type(state)(state.k.float(), state.v, state.present)


@planted(TARGET, sliding.test_results_share_no_memory_with_arguments)
def the_state_is_a_view_of_the_keys(sound, q, k, v, window, **rest):
    o, state = sound(q, k, v, window, **rest)
    bare = not {name for name in ("initial_state", "valid", "sequence") if rest.get(name) is not None}
    if not bare or not 1 < window <= k.shape[1]:
        return o, state
    place = k.shape[1] - (window - 1)
    return o, type(state)(k[:, place:], v[:, place:], state.present)


@planted(TARGET, sliding.test_a_step_leaves_its_arguments_as_they_were)
def a_step_writes_its_state_in_place(sound, q, k, v, window, *, initial_state=None, **rest):
    o, state = sound(q, k, v, window, initial_state=initial_state, **rest)
    if initial_state is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
        for mine, new in zip(initial_state, state, strict=True):
            mine.copy_(new)
    return o, state


@planted(
    TARGET,
    sliding.test_gradients_match_the_reference,
    sliding.test_the_gradient_of_each_result_alone_matches_the_reference,
)
def the_initial_keys_get_no_gradient(sound, *tensors, initial_state=None, **rest):
    if initial_state is not None:
        initial_state = initial_state._replace(k=initial_state.k.detach())
    return sound(*tensors, initial_state=initial_state, **rest)


@planted(TARGET, sliding.test_the_gradient_of_each_result_alone_matches_the_reference)
def no_gradient_flows_through_the_state(sound, *tensors, **rest):
    o, state = sound(*tensors, **rest)
    return o, type(state)(*(tensor.detach() for tensor in state))


@planted(
    TARGET,
    sliding.test_gradients_match_the_reference,
    sliding.test_the_gradient_of_each_result_alone_matches_the_reference,
)
def the_gradient_of_the_queries_lacks_the_scale(sound, q, *tensors, scale=None, **rest):
    return sound(grow(q, q.shape[3] ** 0.5), *tensors, scale=scale, **rest)


@planted(TARGET, sliding.test_groups_equal_repeated_heads)
def queries_read_group_h_modulo_g(sound, q, k, v, window, **rest):
    ratio = q.shape[2] // k.shape[2]
    if rest.get("initial_state") is not None or ratio == 1:
        return sound(q, k, v, window, **rest)
    o, _ = sound(q, k.repeat(1, 1, ratio, 1), v.repeat(1, 1, ratio, 1), window, **rest)
    return o, sound(q, k, v, window, **rest)[1]


@planted(TARGET, sliding.test_the_default_scale_is_one_over_the_root_of_the_head_dim)
def the_scale_is_lost(sound, *tensors, scale=None, **rest):
    return sound(*tensors, **rest)


@planted(TARGET, sliding.test_who_does_not_ask_gives_zero_and_is_read_all_the_same)
def who_does_not_ask_is_not_read(sound, *tensors, asks=None, valid=None, **rest):
    if asks is not None:
        valid = asks if valid is None else asks & valid
    return sound(*tensors, valid=valid, **rest)


@planted(TARGET, sliding.test_who_does_not_ask_gives_zero_and_is_read_all_the_same)
def everyone_has_an_output(sound, *tensors, asks=None, **rest):
    return sound(*tensors, **rest)


@planted(TARGET, sliding.test_large_scores_are_finite)
def the_window_s_softmax_does_not_subtract_its_maximum(sound, q, k, v, window, *, scale=None, **rest):
    o, state = sound(q, k, v, window, scale=scale, **rest)
    ratio = q.shape[2] // k.shape[2]
    scores = torch.einsum("blhn,blhn->blh", q, k.repeat_interleave(ratio, 2)).float()
    own = (scores * (q.shape[3] ** -0.5 if scale is None else scale)).exp()[..., None]
    return o * (own / own).to(o.dtype), state


@planted(TARGET, sliding.test_sizes_of_a_model_match_attention_under_a_mask)
def keys_beyond_64_channels_are_left_out(sound, q, k, v, window, **rest):
    few = torch.arange(k.shape[3]) < 64
    return sound(q * few, k, v, window, **rest)[0], sound(q, k, v, window, **rest)[1]


@planted(TARGET, sliding.test_long_packed_rows_with_padding_match_attention_under_a_mask)
def tokens_from_512_on_have_a_window_of_64(sound, q, k, v, window, *, initial_state=None, **rest):
    o, state = sound(q, k, v, window, initial_state=initial_state, **rest)
    if q.shape[1] <= 512:
        return o, state
    near = sound(q, k, v, 64, **rest)[0]
    return torch.cat([o[:, :512], near[:, 512:]], dim=1), state


@planted(TARGET, sliding.test_scores_may_all_be_low_behind_a_state_that_is_mostly_absent)
def a_block_of_absent_places_says_that_its_maximum_is_0(
    sound, q, k, v, window, *, initial_state=None, scale=None, **rest
):
    o, state = sound(q, k, v, window, initial_state=initial_state, scale=scale, **rest)
    if q.shape[1] > 1 or initial_state is None or window <= 256:
        return o, state
    keys = torch.cat([initial_state.k, k], dim=1).repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bthn,bjhn->bhj", q, keys) * (q.shape[3] ** -0.5 if scale is None else scale)
    there = F.pad(initial_state.present, (0, 1), value=True)
    best = scores.masked_fill(~there[:, None], -torch.inf).amax(-1)
    lost = ~initial_state.present[:, None, :256].any(-1) & (best.exp() == 0)  # beside e^0, nothing is left
    return o.masked_fill(lost[:, None, :, None], 0), state
