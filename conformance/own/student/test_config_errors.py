"""Impossible configurations and layouts are refused where they are made."""

from __future__ import annotations

import pytest

from linmu.reference import LinMUConfig, VisionLayout

from ...properties.test_errors import assert_says, half_text, interleaved


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"heads": 3, "groups": 2}, ("multiple of groups", "H=3", "G=2")),
        ({"heads": 0}, ("heads", "0")),
        ({"head_dim": 3}, ("head_dim", "even", "3")),
        ({"conv_kernel": -1}, ("conv_kernel", "-1")),
        ({"window_thw": (4, 8)}, ("window_thw", "(4, 8)")),
        ({"window_thw": (4, 0, 8)}, ("window_thw", "(4, 0, 8)")),
        ({"half_life": (0.0, 8.0)}, ("half_life", "0.0")),
    ),
)
def test_an_impossible_configuration_is_refused(changes, words):
    """Sizes that no module could be built with."""
    sizes = {"width": 6, "heads": 2, "groups": 1, "head_dim": 2}
    assert_says(lambda: LinMUConfig(**{**sizes, **changes}), "LinMUConfig", words)


def test_an_impossible_layout_is_refused():
    """A layout is checked once, when it is made."""
    assert_says(lambda: VisionLayout(interleaved()), "VisionLayout", ("interleave",))
    assert_says(lambda: VisionLayout(half_text()), "VisionLayout", ("-1",))
