"""The trip of a test's tensors to another device and back, on torch's device without memory."""

from __future__ import annotations

import torch

from linmu import optimized, reference

from ..harness.backends import Backend
from ..harness.devices import moved
from ..harness.strides import oddly_strided

CONFIG = reference.LinMUConfig(width=6, heads=2, groups=1, head_dim=2, text_window=0)
ELSEWHERE = Backend("linmu.optimized@meta", optimized, "meta")


def test_strides_survive_the_trip():
    plain = torch.randn(2, 3, 4)
    for tensor in (plain, oddly_strided(plain), plain.transpose(0, 2), plain[:, :1].expand(2, 5, 4)):
        assert moved(tensor, "meta").stride() == tensor.stride()
        assert moved(tensor, "meta").shape == tensor.shape


def test_containers_keep_their_type():
    state = reference.FlexMAState(torch.ones(1), torch.ones(2))
    there = moved({"state": state, "list": [1.0, torch.ones(3)], "nothing": None}, "meta")
    assert isinstance(there["state"], reference.FlexMAState) and there["state"].scan.is_meta
    assert there["list"][0] == 1.0 and there["list"][1].is_meta and there["nothing"] is None


def test_a_layout_takes_its_samples_along_and_nothing_that_it_found_before():
    layout = reference.VisionLayout(torch.full((1, 3, 4), -1), torch.tensor([[0, 0, 1]]))
    layout.order(0)
    there = moved(layout, "cpu")
    assert there is not layout and there.sequence is layout.sequence and there.coords is layout.coords
    assert not there._memo


def test_a_module_computes_there_and_keeps_its_parameters_here():
    module = ELSEWHERE.FlexMA(CONFIG, 0)
    output, state = module(torch.randn(2, 5, 6))
    assert output.is_meta and output.shape == (2, 5, 6) and state.scan.is_meta
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def test_a_subclass_may_have_a_forward_of_its_own():
    class Hosted(ELSEWHERE.MMATE):
        def forward(self, embeddings):
            return super().forward(embeddings[..., :6])[0]

    assert Hosted(CONFIG, 0)(torch.randn(1, 3, 8)).shape == (1, 3, 6)
    assert isinstance(Hosted(CONFIG, 0).flex_ma, ELSEWHERE.MMATE.flex_ma_class)


def test_an_operator_computes_there():
    result, state = ELSEWHERE.causal_conv(torch.randn(2, 5, 6), torch.randn(6, 4))
    assert result.is_meta and state.shape == (2, 3, 6)
