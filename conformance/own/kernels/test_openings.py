"""What a layout keeps for the scans of all layers: which segment comes next, at any length of chunks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given

from linmu import optimized, reference
from linmu.optimized import VisionLayout
from linmu.optimized.layout import permute_tokens
from linmu.optimized.layout.segments import next_segment, openings_of

from ...harness.compare import assert_exact
from ...harness.layouts import layouts
from .gpu_cases import prompt

CHUNKS = (16, 32, 64, 128)


@given(layouts())
def test_openings_hold_the_next_segment_of_every_chunk(case):
    coords = case.coords
    for chunk in CHUNKS:
        found = openings_of(VisionLayout(coords).openings, coords.shape[1], chunk)
        wanted = next_segment(coords[..., 0], coords[..., 0] >= 0, chunk)
        assert_exact(found, wanted, case, f"chunks of {chunk}")


@pytest.mark.parametrize("length", [203, 600])
def test_openings_of_many_chunks(length):
    layout = VisionLayout(prompt(length).coords)
    for chunk in CHUNKS:
        found = openings_of(layout.openings, length, chunk)
        assert_exact(
            found, next_segment(layout.segment, layout.is_vision, chunk), length, f"chunks of {chunk}"
        )


def test_a_layout_takes_tokens_into_its_order():
    layout, tensor = VisionLayout(prompt(203).coords), torch.randn(2, 203, 3)
    for layer in range(4):
        wanted = permute_tokens(tensor, layout.order(layer))
        assert_exact(layout.in_order(tensor, layer), wanted, layer, "in order")
        assert_exact(layout.in_order(tensor[..., 1:], layer), wanted[..., 1:], layer, "columns of a tensor")


@given(layouts())
def test_a_layout_makes_the_orders_of_the_reference(case):
    """All four at once; numbers that no key can join are told apart one by one."""
    for coords in (case.coords, torch.where(case.coords >= 0, case.coords * 2**40, -1)):
        ours, wanted = VisionLayout(coords), reference.VisionLayout(coords)
        for layer in range(5):
            assert_exact(ours.order(layer), wanted.order(layer), case, f"order of layer {layer}")
        for layer in range(2):
            windows = (kind.windows((1, 3, 2), layer) for kind in (ours, wanted))
            assert_exact(*windows, case, f"windows of layer {layer}")


@given(layouts())
def test_the_next_segment_is_that_of_the_next_vision_token(case):
    """Spelt out token by token: text and padding are passed over, after the last there is none."""
    for chunk in (1, 3, 16):
        found, vision = next_segment(case.segment, case.segment >= 0, chunk), case.segment >= 0
        starts = [min(start, case.shape[1]) for start in range(0, case.shape[1] + chunk, chunk)]
        wanted = [
            [next(iter(ids[start:][inside[start:]].tolist()), -1) for start in starts]
            for ids, inside in zip(case.segment, vision, strict=True)
        ]
        assert_exact(found, torch.tensor(wanted), case, f"chunks of {chunk}")


def test_one_sort_makes_the_orders_of_all_layers():
    """However many layers ask, for orders or for tokens in them."""
    layout = VisionLayout(prompt(203).coords)
    with mock.patch.object(optimized.layout, "scan_rows", wraps=optimized.layout.scan_rows) as made:
        for layer in range(8):
            layout.in_order(layout.coords, layer), layout.order(layer)
    assert made.call_count == 1


@pytest.mark.parametrize("shape", [(0, 3), (1, 0), (2, 0), (2, 5)])
def test_a_prompt_without_vision_has_a_layout(shape):
    """Nor any tokens, maybe."""
    layout = VisionLayout(torch.full((*shape, 4), -1))
    position = torch.arange(shape[1]).expand(shape)
    for layer in range(4):
        assert_exact(layout.order(layer), position, shape, f"order of layer {layer}")
        tokens = layout.vision_tokens((2, 3, 3), layer)
        for found in (layout.windows((2, 3, 3), layer), tokens.row, tokens.window_id.long()):
            assert_exact(found, torch.full(shape, -1), shape, f"windows of layer {layer}")
