"""What a layout keeps for the scans of all layers: which segment comes next, at any length of chunks."""

from __future__ import annotations

import pytest
import torch
from compare import assert_exact
from gpu_cases import prompt
from hypothesis import given
from layouts import layouts

from linmu.optimized import VisionLayout
from linmu.optimized.layout import permute_tokens
from linmu.optimized.scan_masks import next_segment, openings_of

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
