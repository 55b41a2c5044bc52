"""A scan in parts that do not wait for each other is the scan of the whole prompt."""

from __future__ import annotations

import pytest
import torch

from .gpu_cases import prompt
from .scan_parts import check


@pytest.mark.parametrize("cuts", [[70], [64, 65, 128]])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_whose_scans_begin_alone_make_the_whole(cuts, masked):
    """Cuts inside and beside segments and chunks, on the torch engine; `trial_block` has the kernels."""
    check(prompt(203).coords, torch.float64, cuts, 1e-9, masked=masked)


def test_parts_of_text_make_the_whole():
    check(prompt(203).coords, torch.float64, [70], 1e-9, masked=True, vision=False)
