"""Modules that remember what changes between two calls, each in one way to change it."""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from linmu.reference import VisionLayout, flex_ma, local_swin
from linmu.reference.projections import split_heads

from ..properties import test_flex_ma as flex
from ..properties import test_local_swin as swin
from ..properties import test_m_mate as mate
from .planting import BUGS, Bug, planted


def fused(key):
    """q, k and v from one matrix, which is put together anew only when `key(module)` is another one."""

    def broken(reference):
        class Broken(reference):
            def project_heads(self, u):
                if self.training or torch.is_grad_enabled() or self.config.qk_norm:
                    return super().project_heads(u)
                parts = (self.q_proj, self.k_proj, self.v_proj)
                if getattr(self, "fused", (None,))[0] != key(self):
                    weight = torch.cat([part.weight for part in parts])
                    bias = torch.cat([part.bias for part in parts]) if self.config.qkv_bias else None
                    self.fused = (key(self), [(weight, bias)])
                ((weight, bias),) = self.fused[1]
                rows = [part.out_features for part in parts]
                q, k, v = F.linear(u, weight, bias).split(rows, dim=-1)
                groups = self.config.groups
                return split_heads(q, self.config.heads), split_heads(k, groups), split_heads(v, groups)

        return Broken

    return broken


def pointers(module):
    return [parameter.data_ptr() for parameter in module.parameters()]


def counts(module):
    return [parameter._version for parameter in module.parameters()]


KEYS = {
    "for ever": lambda module: 0,
    "until its parameters move": pointers,
    "until torch counts a change": lambda module: (pointers(module), counts(module)),
    "until its parameters are others": lambda module: [id(parameter) for parameter in module.parameters()],
}
for name, of in (("LocalSwin", swin), ("FlexMA", flex)):
    for until, key in KEYS.items():
        title = f"{name}_keeps_one_matrix_{until.replace(' ', '_')}"
        BUGS.append(Bug(title, name, fused(key), (of.test_nothing_is_remembered_between_calls,)))


@planted("FlexMA", flex.test_nothing_is_remembered_between_calls)
def rates_of_decay_are_remembered_with_gradients(reference):
    class Broken(reference):
        def scan(self, *given):
            if not hasattr(self, "rates"):
                self.rates = [self.A_log.detach().clone()]
            own, self.A_log = self.A_log, nn.Parameter(self.rates[0])
            try:
                return super().scan(*given)
            finally:
                self.A_log = own

    return Broken


@planted("LocalSwin", swin.test_nothing_is_remembered_between_calls)
def windows_are_remembered_by_shape(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            if layout is not None:
                windows = layout.windows(self.config.window_thw, self.layer_index)
                ids = self.__dict__.setdefault("ids", {}).setdefault(windows.shape, windows)

                def attend(q, k, v, _):
                    return right(q, k, v, ids)

                right = local_swin.window_attention
                with mock.patch.object(local_swin, "window_attention", attend):
                    return super().forward(hidden_states, layout, **rest)
            return super().forward(hidden_states, layout, **rest)

    return Broken


@planted("FlexMA", flex.test_nothing_is_remembered_between_calls)
def the_order_is_remembered_by_the_address_of_coordinates(reference):
    class Broken(reference):
        def forward(self, hidden_states, layout=None, **rest):
            if layout is not None:
                orders = self.__dict__.setdefault("orders", {})
                key = (layout.coords.data_ptr(), self.training)
                layout = orders.setdefault(key, VisionLayout(layout.coords.clone()))
            return super().forward(hidden_states, layout, **rest)

    return Broken


def angles_by_count(reference):
    """cos and sin are copied when torch counts a change of them."""

    class Broken(reference):
        def forward(self, hidden_states, layout=None, *, position_embeddings=None, **rest):
            if position_embeddings is not None and not torch.is_inference_mode_enabled():
                key = [(angle.data_ptr(), angle._version, angle.shape) for angle in position_embeddings]
                if self.__dict__.get("angles", (None,))[0] != key:
                    self.angles = (key, [angle.clone() for angle in position_embeddings])
                position_embeddings = tuple(self.angles[1])
            return super().forward(hidden_states, layout, position_embeddings=position_embeddings, **rest)

    return Broken


for name, of in (("LocalSwin", swin), ("MMATE", mate)):
    caught_by = (of.test_nothing_is_remembered_between_calls,)
    BUGS.append(Bug(f"{name}_remembers_angles_until_torch_counts_a_change", name, angles_by_count, caught_by))


@planted("MMATE", mate.test_nothing_is_remembered_between_calls)
def outputs_are_in_one_buffer_under_inference_mode(reference):
    class Broken(reference):
        def forward(self, *given, **named):
            output, state = super().forward(*given, **named)
            if not torch.is_inference_mode_enabled():
                return output, state
            buffers = self.__dict__.setdefault("buffers", {})
            return buffers.setdefault(output.shape, torch.empty_like(output)).copy_(output), state

    return Broken


@planted("FlexMA", flex.test_nothing_is_remembered_between_calls)
def states_are_in_one_buffer_without_gradients(reference):
    class Broken(reference):
        def forward(self, *given, **named):
            output, state = super().forward(*given, **named)
            if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                return output, state
            buffer = self.__dict__.setdefault("buffers", {}).setdefault(output.shape, state.scan.clone())
            return output, state._replace(scan=buffer.copy_(state.scan))

    return Broken


@planted("MMATE", mate.test_nothing_is_remembered_between_calls)
def evaluation_mixes_in_another_way(reference):
    class Broken(reference):
        def forward(self, *given, **named):
            output, state = super().forward(*given, **named)
            return output if self.training else output * 1.01, state

    return Broken


@planted("FlexMA", flex.test_nothing_is_remembered_between_calls)
def a_step_reads_the_state_that_was_at_this_address(reference):
    class Broken(reference):
        def scan(self, xBC, dt, gate, layout, valid, state, sequence):
            if state is not None and layout is None:
                key = (state.scan.data_ptr(), self.training, torch.is_grad_enabled())
                copy = self.__dict__.setdefault("states", {}).setdefault(key, state.scan.clone())
                state = state._replace(scan=copy)
            return super().scan(xBC, dt, gate, layout, valid, state, sequence)

    return Broken


@planted("FlexMA", flex.test_nothing_is_remembered_between_calls)
def steps_are_projected_with_what_was_there_first(reference):
    class Broken(reference):
        def project(self, u, position_embeddings):
            wide, kept = flex_ma.full_precision_linear, self.__dict__.setdefault("kept", {})

            def remembered(u, linear):
                if self.training or not torch.is_inference_mode_enabled():
                    return wide(u, linear)
                weight = kept.setdefault(id(linear), (linear.weight.clone(), linear.bias.clone()))
                return F.linear(u, *weight)

            with mock.patch.object(flex_ma, "full_precision_linear", remembered):
                return super().project(u, position_embeddings)

    return Broken
