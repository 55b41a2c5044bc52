"""Impossible configurations and layouts are refused where they are made."""

from __future__ import annotations

import pytest
import torch

from linmu import optimized, reference
from linmu.reference import LinMUConfig

from ...properties.test_errors import LAYOUT, assert_says, half_text, interleaved


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"heads": 3, "groups": 2}, ("multiple of groups", "H=3", "G=2")),
        ({"heads": 0}, ("heads", "0")),
        ({"head_dim": 3}, ("head_dim", "even", "3")),
        ({"conv_kernel": -1}, ("conv_kernel", "-1")),
        ({"window_thw": (4, 8)}, ("window_thw", "(4, 8)")),
        ({"window_thw": (4, 0, 8)}, ("window_thw", "(4, 0, 8)")),
        ({"window_thw": (4.0, 8, 8)}, ("window_thw", "(4.0, 8, 8)")),
        ({"window_thw": 8}, ("window_thw", "8")),
        ({"window_thw": "488"}, ("window_thw", "'488'")),
        ({"half_life": (0.0, 8.0)}, ("half_life", "0.0")),
        ({"half_life": (1.0, float("nan"))}, ("half_life", "nan")),
        ({"half_life": ("1", 8.0)}, ("half_life", "'1'")),
        ({"conv_kernel": 2.5}, ("conv_kernel", "2.5")),
        ({"scan_rope": "no"}, ("scan_rope", "'no'")),
        ({"text_only": 0}, ("text_only", "0")),
    ),
)
def test_an_impossible_configuration_is_refused(changes, words):
    """Sizes that no module could be built with."""
    sizes = {"width": 6, "heads": 2, "groups": 1, "head_dim": 2}
    assert_says(lambda: LinMUConfig(**{**sizes, **changes}), "LinMUConfig", words)


@pytest.mark.parametrize("backend", (reference, optimized), ids=("reference", "optimized"))
def test_an_impossible_layout_is_refused(backend):
    """A layout is checked once, when it is made."""
    layout, coords, samples = backend.VisionLayout, LAYOUT.coords, torch.zeros(2, 5, dtype=torch.int64)
    assert_says(lambda: layout(interleaved()), "VisionLayout", ("interleave",))
    assert_says(lambda: layout(half_text()), "VisionLayout", ("-1",))
    assert_says(lambda: layout(coords, samples[:, :4]), "VisionLayout", ("sequence", "(2, 4)"))
    assert_says(lambda: layout(coords, samples.int()), "VisionLayout", ("sequence", "int64"))
    layout(coords, samples)
    samples[0, 3:] = 7
    split = ("one sample", "row 0", "segment 0", "[0, 7]")
    assert_says(lambda: layout(coords, samples), "VisionLayout", split)


@pytest.mark.parametrize("name", ("FlexMA", "LocalSwin"))
@pytest.mark.parametrize("backend", (reference, optimized), ids=("reference", "optimized"))
def test_samples_are_told_once(backend, name):
    """By the layout where there is one: what a caller says beside it might be something else."""
    module = getattr(backend, name)(LinMUConfig(width=6, heads=2, groups=1, head_dim=2), 0)
    u, samples = torch.zeros(2, 5, 6), torch.zeros(2, 5, dtype=torch.int64)
    angles = (torch.ones(1, 5, 2), torch.zeros(1, 5, 2))

    def call():
        return module(u, backend.VisionLayout(LAYOUT.coords), sequence=samples, position_embeddings=angles)

    assert_says(call, name, ("sequence", "VisionLayout(coords, sequence)"))
