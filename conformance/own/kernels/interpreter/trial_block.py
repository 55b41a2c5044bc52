"""Run a whole M-MATE block on linmu.optimized's Triton kernels in the interpreter, watched, against the
reference: outputs, states, and the gradient of every parameter; then a scan in parts. Started by
test_kernels.py.

    TRITON_INTERPRET=1 python trial_block.py DTYPE
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from linmu import optimized, reference

from ....harness.layouts import Layout, Pad, Text, Vision
from ....harness.module_cases import WIDTH, ModuleCase, check_module, random_module
from ..gpu_cases import prompt
from ..scan_parts import check
from . import mend_bfloat16, mend_scalars, watch_memory
from .trial import shrink_blocks

ROWS = (
    (Text(3), Vision(1, (1, 3, 4), "row"), Text(2), Vision(0, (2, 2, 2)), Text(6)),
    (Pad(4), Vision(0, (2, 3, 2), "frame"), Vision(1, (1, 2, 3)), Text(10)),
)
SIZES = {
    "width": WIDTH,
    "head_dim": 16,
    "qkv_bias": True,
    "window_thw": (1, 2, 2),
    "text_window": 3,
}
SAMPLES = (3, 6, 13, 20)  # places where one begins, between the images
TWO_GROUPS, ONE_GROUP = {"heads": 4, "groups": 2}, {"heads": 2, "groups": 1}  # programs are as many as heads
OPTIONS = (
    TWO_GROUPS,
    ONE_GROUP | {"scan_rope": True, "output_gate": True, "head_norm": False},
    ONE_GROUP | {"conv_kernel": 0},
)


class PackedCase(ModuleCase):
    """The same with several samples a row, cut where no row has an image."""

    @property
    def vision_layout(self) -> reference.VisionLayout:
        coords = self.layout.coords
        return reference.VisionLayout(coords, samples_between(coords[..., 0]))


def samples_between(segment: Tensor) -> Tensor:
    """(B, L) int64: a sample begins before and after each image, and in text at SAMPLES."""
    begins = torch.zeros_like(segment)
    for row, ids in enumerate(segment.tolist()):
        for place in range(1, len(ids)):
            inside = set(ids[:place]) & set(ids[place:]) - {-1}
            begins[row, place] = not inside and (place in SAMPLES or ids[place] != ids[place - 1])
    return begins.cumsum(1) + 2**40


def main(dtype: str) -> None:
    """Raises the AssertionError of the first case that fails; in bfloat16 with packed rows."""
    shrink_blocks()
    mend_bfloat16()
    mend_scalars()
    optimized.set_engine("triton")
    for layer_index, options in enumerate(OPTIONS if dtype == "float32" else (ONE_GROUP,)):
        config = reference.LinMUConfig(**SIZES, **options)
        kind = ModuleCase if dtype == "float32" else PackedCase
        rows = ROWS[layer_index - 1 :][:1] if layer_index else ROWS  # both once, then each with other options
        case = kind(Layout(rows), config, layer_index, dtype, seed=layer_index)
        module = random_module(optimized, "MMATE", case)
        with watch_memory():
            check_module(module, reference, "MMATE", case)
    with watch_memory():
        kind, tolerance = (torch.float32, 1e-4) if dtype == "float32" else (torch.bfloat16, 3e-2)
        check(prompt(100).coords, kind, [40], tolerance, masked=dtype == "float32")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
