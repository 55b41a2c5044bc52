"""Students that were saved before the code was put into folders open unchanged.

`saved_before/` was written by commit f0768fe: a Qwen2.5-VL's student in bfloat16, and a Llama's in float32,
with random weights. Beside each are inputs, and the logits that it gave for them in float64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from linmu import optimized, reference

from .tiny_checkpoint import logits_of

FOLDERS = Path(__file__).parent / "saved_before"
AUTO_CLASSES = {"vision": AutoModelForImageTextToText, "text": AutoModelForCausalLM}


def expected(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs, wide enough for a student in float64, and its logits."""
    inputs = load_file(FOLDERS / kind / "expected.safetensors")
    logits = inputs.pop("logits")
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}, logits


@pytest.mark.parametrize("kind", AUTO_CLASSES)
@pytest.mark.parametrize("package", [reference, optimized], ids=["reference", "optimized"])
def test_a_student_saved_before_gives_the_logits_that_it_gave(kind, package):
    inputs, logits = expected(kind)
    student = package.load(FOLDERS / kind)
    torch.testing.assert_close(logits_of(student.double(), inputs), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", AUTO_CLASSES)
def test_a_student_saved_before_has_the_tensors_and_dtypes_that_it_had(kind, tmp_path):
    saved = load_file(FOLDERS / kind / "model.safetensors")
    student = AUTO_CLASSES[kind].from_pretrained(FOLDERS / kind)
    student.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == again.keys()
    for name, tensor in saved.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
