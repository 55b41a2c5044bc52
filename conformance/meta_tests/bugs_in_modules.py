"""Broken modules, and the properties that must notice.

A bug turns the reference's class into a broken one.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from linmu.reference import VisionLayout, local_swin, m_mate, window_attention
from linmu.reference.numerics import repeat_groups

from ..properties import test_flex_ma as flex
from ..properties import test_local_swin as swin
from ..properties import test_m_mate as mate
from .planting import BUGS, Bug, planted


@planted("FlexMA", flex.test_padding_changes_nothing)
def the_branch_takes_padding_for_text(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, valid=None, **rest):
            return super().forward(hidden_states, layout, **rest)

    return Broken


@planted("FlexMA", flex.test_splitting_outside_blocks_changes_nothing, flex.test_steps_equal_prefill)
def the_branch_forgets_its_convolution_state(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, state=None, **rest):
            state = state if state is None else state._replace(conv=torch.zeros_like(state.conv))
            return super().forward(hidden_states, layout, state=state, **rest)

    return Broken


@planted("FlexMA", flex.test_flex_ma_equals_its_second_formulation)
def the_branch_scans_in_the_order_of_the_next_layer(reference):
    class Broken(reference):
        def __init__(self, config, layer_index):
            super().__init__(config, layer_index + 1)

    return Broken


@planted("FlexMA", flex.test_flex_ma_equals_its_second_formulation)
def the_scan_order_is_not_undone(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            output, state = super().forward(hidden_states, layout, **rest)
            order = layout.order(self.layer_index if self.config.rotary_major else 0)
            return output.gather(1, order[..., None].expand_as(output)), state

    return Broken


@planted("FlexMA", flex.test_no_output_depends_on_what_its_block_does_not_see)
def the_branch_takes_all_images_for_one(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            merged = layout.coords.clone()
            merged[..., 0].clamp_(max=0)
            return super().forward(hidden_states, VisionLayout(merged), **rest)

    return Broken


@planted("FlexMA", flex.test_attention_is_copied_with_its_biases, flex.test_flex_ma_starts_from_attention)
def the_biases_of_attention_are_lost(reference):
    class Broken(reference):
        def copy_attention(self, attention):
            super().copy_attention(attention)
            for projection in (self.q_proj, self.k_proj, self.v_proj):
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)

    return Broken


@planted("FlexMA", flex.test_flex_ma_starts_at_its_initial_values)
def the_fast_heads_come_last(reference):
    class Broken(reference):
        def __init__(self, config, layer_index):
            super().__init__(config, layer_index)
            self.A_log.data = self.A_log.data.flip(0)

    return Broken


@planted("LocalSwin", swin.test_local_swin_equals_its_second_formulation)
def the_branch_never_shifts_its_windows(reference):
    class Broken(reference):
        def __init__(self, config, layer_index):
            super().__init__(config, 0)

    return Broken


@planted("LocalSwin", swin.test_text_without_a_window_gets_zero_and_gives_nothing)
def the_output_bias_reaches_text(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout, **rest):
            output, state = super().forward(hidden_states, layout, **rest)
            bias = 0 if self.o_proj.bias is None else self.o_proj.bias
            return torch.where(layout.is_vision[..., None], output, output + bias), state

    return Broken


@planted("LocalSwin", swin.test_one_window_over_an_image_is_the_teachers_attention)
def the_branch_attends_without_positions(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout, *, position_embeddings=None, **rest):
            cos, sin = position_embeddings
            still = (torch.ones_like(cos), torch.zeros_like(sin))
            return super().forward(hidden_states, layout, position_embeddings=still, **rest)

    return Broken


@planted("LocalSwin", swin.test_splitting_outside_blocks_changes_nothing, swin.test_steps_equal_prefill)
def the_text_window_is_forgotten(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, state=None, **rest):
            return super().forward(hidden_states, layout, **rest)

    return Broken


@planted("LocalSwin", swin.test_splitting_outside_blocks_changes_nothing, swin.test_steps_equal_prefill)
def the_text_window_is_never_moved(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, state=None, **rest):
            output, after = super().forward(hidden_states, layout, state=state, **rest)
            return output, after if state is None else state

    return Broken


@planted("LocalSwin", swin.test_padding_changes_nothing)
def padding_is_in_the_text_window(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, valid=None, **rest):
            return super().forward(hidden_states, layout, **rest)

    return Broken


@planted(
    "LocalSwin",
    swin.test_local_swin_equals_its_second_formulation,
    swin.test_a_token_sees_its_window_and_nothing_else,
)
def text_does_not_see_the_vision_before_it(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, valid=None, **rest):
            output, _ = super().forward(hidden_states, layout, valid=valid, **rest)
            text = torch.ones_like(layout.is_vision) if valid is None else valid
            of_text, state = super().forward(hidden_states, layout, valid=text & ~layout.is_vision, **rest)
            return torch.where(layout.is_vision[..., None], output, of_text), state

    return Broken


@planted("LocalSwin", swin.test_the_text_window_is_kept_in_the_dtype_of_the_model)
def the_text_window_is_kept_in_float64(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            output, state = super().forward(hidden_states, layout, **rest)
            return output, state and state._replace(k=state.k.double())

    return Broken


@planted("MMATE", mate.test_text_without_a_window_is_pinned_to_flex_ma)
def text_is_mixed_too(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            output, state = super().forward(hidden_states, layout, **rest)
            mix = self.mix_proj(hidden_states).sigmoid()
            return torch.where(layout.is_vision[..., None], output, (mix * output).to(output.dtype)), state

    return Broken


@planted(
    "MMATE",
    mate.test_the_mix_reaches_from_one_branch_to_the_other,
    mate.test_m_mate_equals_its_second_formulation,
)
def text_takes_flex_ma_in_spite_of_its_window(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            output, state = super().forward(hidden_states, layout, **rest)
            flex, _ = self.flex_ma(hidden_states, layout, **rest)
            return torch.where(layout.is_vision[..., None], output, flex), state

    return Broken


@planted("MMATE", mate.test_splitting_outside_blocks_changes_nothing, mate.test_steps_equal_prefill)
def the_block_drops_the_text_window(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, state=None, **rest):
            state = None if state is None else state._replace(window=None)
            return super().forward(hidden_states, layout, state=state, **rest)

    return Broken


@planted(
    "MMATE",
    mate.test_the_mix_reaches_from_one_branch_to_the_other,
    mate.test_m_mate_equals_its_second_formulation,
)
def the_mix_is_swapped(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            for parameter in self.mix_proj.parameters():
                parameter.data.neg_()
            result = super().forward(hidden_states, layout, **rest)
            for parameter in self.mix_proj.parameters():
                parameter.data.neg_()
            return result

    return Broken


@planted("MMATE", mate.test_both_branches_start_from_attention)
def the_branches_share_their_weights(reference):
    class Broken(reference):
        def copy_attention(self, attention):
            super().copy_attention(attention)
            self.local_swin.q_proj = self.flex_ma.q_proj

        def named_parameters(self, *args, **kwargs):
            return super().named_parameters(*args, **{**kwargs, "remove_duplicate": False})

    return Broken


@planted("MMATE", mate.test_state_dicts_are_interchangeable)
def an_option_has_another_name(reference):
    class Broken(reference):
        def __init__(self, config, layer_index):
            super().__init__(config, layer_index)
            self.mixture = self.mix_proj
            del self.mix_proj

    return Broken


@planted("MMATE", mate.test_every_parameter_gets_a_gradient)
def the_mix_is_not_trained(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            self.mix_proj.requires_grad_(False)
            result = super().forward(hidden_states, layout, **rest)
            self.mix_proj.requires_grad_(True)
            return result

    return Broken


@planted("FlexMA", flex.test_one_vision_token_may_be_a_piece)
def a_piece_of_one_token_is_taken_for_a_step(reference):
    class Broken(reference):
        def scan(self, xBC, dt, gate, layout, valid, state, sequence):
            one = state is not None and xBC.shape[1] == 1
            return super().scan(xBC, dt, gate, None if one else layout, valid, state, sequence)

    return Broken


def detached(part):
    """The state before, in this part, passes no gradient on."""

    def broken(reference):
        class Broken(reference):
            def forward(self, hidden_states, layout=None, *, state=None, **rest):
                state = None if state is None else state._replace(**{part: getattr(state, part).detach()})
                return super().forward(hidden_states, layout, state=state, **rest)

        return Broken

    return broken


for name, of, parts in (("FlexMA", flex, ("conv", "scan")), ("LocalSwin", swin, ("k", "v"))):
    for part in parts:
        caught_by = (of.test_splitting_outside_blocks_changes_nothing,)
        BUGS.append(Bug(f"the_{part}_state_of_{name}_passes_no_gradient_on", name, detached(part), caught_by))


@planted("FlexMA", flex.test_angles_of_one_row_serve_all_rows)
def angles_of_one_row_are_permuted_as_that_row(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, position_embeddings=None, **rest):
            if layout is not None and position_embeddings is not None and len(position_embeddings[0]) == 1:
                order, inverse = layout.order(self.order_layer)[:1], layout.inverse(self.order_layer)
                rows = torch.zeros_like(inverse)
                position_embeddings = tuple(a[:, order[0]][rows, inverse] for a in position_embeddings)
            return super().forward(hidden_states, layout, position_embeddings=position_embeddings, **rest)

    return Broken


@planted("FlexMA", flex.test_flex_ma_and_gradients_match_the_reference)
def the_norm_has_an_eps_of_its_own(reference):
    class Broken(reference):
        def project_out(self, y, u):
            own, self.config = self.config, replace(self.config, norm_eps=1e-6)
            try:
                return super().project_out(y, u)
            finally:
                self.config = own

    return Broken


@planted("FlexMA", flex.test_flex_ma_starts_at_its_initial_values)
def half_lives_are_those_of_the_default(reference):
    class Broken(reference):
        def initial_values(self):
            own, self.config = self.config, replace(self.config, half_life=(64.0, 8192.0))
            try:
                return super().initial_values()
            finally:
                self.config = own

    return Broken


@planted("FlexMA", flex.test_steps_are_projected_in_float32)
def steps_have_the_dtype_of_the_model(reference):
    class Broken(reference):
        def project(self, u, position_embeddings):
            xBC, dt, gate = super().project(u, position_embeddings)
            return xBC, dt.to(u.dtype).to(dt.dtype), gate

    return Broken


@planted("FlexMA", flex.test_a_state_is_left_as_it_was)
def a_step_writes_to_its_state_under_inference_mode(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, state=None, **rest):
            output, after = super().forward(hidden_states, layout, state=state, **rest)
            if state is not None and torch.is_inference_mode_enabled():
                state.scan.copy_(after.scan)
            return output, after

    return Broken


@planted("MMATE", mate.test_a_decoder_of_text_alone_leaves_out_what_vision_needs)
def a_decoder_of_text_alone_has_smaller_steps(reference):
    class Flex(reference.flex_ma_class):
        def project(self, u, position_embeddings):
            xBC, dt, gate = super().project(u, position_embeddings)
            return xBC, dt * (0.9 if self.config.text_only else 1.0), gate

    class Broken(reference):
        flex_ma_class = Flex

    return Broken


@planted("FlexMA", flex.test_the_scan_gate_is_projected_in_float32)
def the_gate_has_the_dtype_of_the_model(reference):
    class Broken(reference):
        def project(self, u, position_embeddings):
            xBC, dt, gate = super().project(u, position_embeddings)
            return xBC, dt, gate.to(u.dtype).to(gate.dtype)

    return Broken


@planted("FlexMA", flex.test_the_norm_of_a_head_is_taken_in_float32)
def the_norm_is_taken_in_the_dtype_of_the_model(reference):
    class Broken(reference):
        def project_out(self, y, u):
            if not self.config.head_norm or y.dtype == torch.float64:
                return super().project_out(y, u)
            factor = torch.rsqrt(y.float().square().mean(-1, keepdim=True) + self.config.norm_eps)
            y = y * factor.to(y.dtype) * self.norm_weight.view(y.shape[2:]).to(y.dtype)
            y = y.flatten(2) * (F.silu(self.z_proj(u)) if self.config.output_gate else 1)
            return self.o_proj(y)

    return Broken


@planted("FlexMA", flex.test_steps_may_have_any_size)
def steps_are_limited(reference):
    class Broken(reference):
        def project(self, u, position_embeddings):
            xBC, dt, gate = super().project(u, position_embeddings)
            return xBC, dt.clamp(1e-4, 100.0), gate

    return Broken


@planted("MMATE", mate.test_the_branches_are_mixed_in_float32)
def the_mix_has_the_dtype_of_the_model(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            wide = m_mate.full_precision_linear

            def rounded(u, linear):
                return wide(u, linear).sigmoid().to(u.dtype).to(linear.weight.dtype).logit()

            with mock.patch.object(m_mate, "full_precision_linear", rounded):
                return super().forward(hidden_states, layout, **rest)

    return Broken


def rounded_by_autocast(u, linear):
    """A projection that autocast sees."""
    return F.linear(u.float(), linear.weight.float(), linear.bias.float()).float()


@planted("FlexMA", flex.test_steps_are_projected_in_float32)
def autocast_rounds_steps(reference):
    class Broken(reference):
        def project(self, u, position_embeddings):
            xBC, dt, gate = super().project(u, position_embeddings)
            if torch.is_autocast_enabled("cpu"):
                dt = F.softplus(rounded_by_autocast(u, self.dt_proj))
            return xBC, dt, gate

    return Broken


@planted("FlexMA", flex.test_steps_are_projected_in_float32)
def steps_are_kept_from_autocast_beside_half_precision_alone(reference):
    class Broken(reference):
        def project(self, u, position_embeddings):
            xBC, dt, gate = super().project(u, position_embeddings)
            return xBC, F.softplus(self.dt_proj(u)).float() if u.dtype == torch.float32 else dt, gate

    return Broken


@planted("FlexMA", flex.test_the_scan_gate_is_projected_in_float32)
def autocast_rounds_the_gate(reference):
    class Broken(reference):
        def project(self, u, position_embeddings):
            xBC, dt, gate = super().project(u, position_embeddings)
            if torch.is_autocast_enabled("cpu"):
                gate = torch.sigmoid(rounded_by_autocast(u, self.scan_gate_proj))
            return xBC, dt, gate

    return Broken


@planted("FlexMA", flex.test_the_norm_of_a_head_is_taken_in_float32)
def autocast_rounds_the_norm(reference):
    class Broken(reference):
        def project_out(self, y, u):
            if not torch.is_autocast_enabled("cpu") or not self.config.head_norm:
                return super().project_out(y, u)
            mean = torch.full((y.shape[-1], 1), 1 / y.shape[-1])
            factor = torch.rsqrt((y.float().square() @ mean).float() + self.config.norm_eps)
            y = y * factor.to(y.dtype) * self.norm_weight.view(y.shape[2:]).to(y.dtype)
            y = y.flatten(2) * (F.silu(self.z_proj(u)) if self.config.output_gate else 1)
            return self.o_proj(y)

    return Broken


@planted("MMATE", mate.test_the_branches_are_mixed_in_float32)
def autocast_rounds_the_mix(reference):
    class Broken(reference):
        def forward(self, *given, **named):
            wide = m_mate.full_precision_linear
            narrow = rounded_by_autocast if torch.is_autocast_enabled("cpu") else wide
            with mock.patch.object(m_mate, "full_precision_linear", narrow):
                return super().forward(*given, **named)

    return Broken


def attends_under_autocast(reference):
    """Scores are products that autocast rounds."""

    class Broken(reference):
        def forward(self, *given, **named):
            def attention(q, k, v, window_id):
                if not torch.is_autocast_enabled("cpu"):
                    return window_attention(q, k, v, window_id)
                mates = (window_id[:, :, None] == window_id[:, None, :]) & (window_id >= 0)[:, :, None]
                k, v = repeat_groups(k, q.shape[2]), repeat_groups(v, q.shape[2])
                scores = torch.einsum("bihn,bjhn->bhij", q, k).float() * q.shape[3] ** -0.5
                share = scores.masked_fill(~mates[:, None], -torch.inf).softmax(-1).nan_to_num()
                return torch.einsum("bhij,bjhp->bihp", share, v).to(q.dtype)

            with mock.patch.object(local_swin, "window_attention", attention):
                return super().forward(*given, **named)

    return Broken


for name, of in (("LocalSwin", swin), ("MMATE", mate)):
    caught_by = (of.test_autocast_rounds_projections_and_nothing_else,)
    BUGS.append(Bug(f"autocast_rounds_the_scores_of_{name}", name, attends_under_autocast, caught_by))


@planted("FlexMA", flex.test_autocast_rounds_projections_and_nothing_else)
def projections_do_not_heed_autocast(reference):
    class Broken(reference):
        def forward(self, *given, **named):
            with torch.autocast("cpu", enabled=False):
                return super().forward(*given, **named)

    return Broken


@planted("LocalSwin", swin.test_a_step_reads_a_window_of_more_than_a_thousand_tokens)
def a_step_reads_a_thousand_keys_at_most(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, state=None, **rest):
            if state is not None and hidden_states.shape[1] == 1:
                near = torch.arange(state.present.shape[1], 0, -1) < 1024
                state = state._replace(present=state.present & near)
            return super().forward(hidden_states, layout, state=state, **rest)

    return Broken


@planted("MMATE", mate.test_a_step_reads_a_window_of_more_than_a_thousand_tokens)
def the_window_of_a_block_ends_at_1024_without_gradients(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, state=None, **rest):
            if state is not None and state.window is not None and not torch.is_grad_enabled():
                near = torch.arange(state.window.present.shape[1], 0, -1) < 1024
                present = state.window.present & near
                state = state._replace(window=state.window._replace(present=present))
            return super().forward(hidden_states, layout, state=state, **rest)

    return Broken


def behind_gaps(valid):
    """(B, L) int64, one more behind each run of 2,048 invalid tokens."""
    place = torch.arange(valid.shape[1]).expand(valid.shape)
    last = torch.where(valid, place, -1).cummax(1).values  # the valid token before, or -1
    far = torch.nn.functional.pad(place[:, 1:] - last[:, :-1], (1, 0)) > 2048
    return (far & valid).cumsum(1)


def forgotten_behind_gaps(part):
    """The convolution, or the scan, begins anew."""

    def broken(reference):
        class Broken(reference):
            pass

        def begin_anew(self, *given):
            *given, valid, state, sequence = given
            sequence = sequence if valid is None else behind_gaps(valid)
            return getattr(reference, part)(self, *given, valid, state, sequence)

        setattr(Broken, part, begin_anew)
        return Broken

    return broken


for part in ("convolve", "scan"):
    caught_by = (flex.test_thousands_of_masked_tokens_are_as_if_absent,)
    BUGS.append(Bug(f"long_gaps_are_not_crossed_in_{part}", "FlexMA", forgotten_behind_gaps(part), caught_by))
