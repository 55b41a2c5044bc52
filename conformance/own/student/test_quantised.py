"""Quantised students: what stays precise, what is saved opens as it was, and the table of what it costs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from linmu.reference import convert, load
from linmu.reference.demo import TEACHER
from linmu.reference.prompts.processors import load_processor
from linmu.reference.student.model import FLOAT32_PARAMETERS
from linmu.reference.student.quantised import QUANTISERS, quantised_weights, refuse_packed, weight_bytes
from linmu.reference.training.commands.main import main

from .tiny_checkpoint import NEW_PARAMETERS, shake

NEEDS_A_GPU = "torchao, fp8, inputs too"
HERE = [name for name in QUANTISERS if name != NEEDS_A_GPU]
ROUNDED = {"q_proj", "k_proj", "v_proj", "o_proj", "z_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A student of the bundled teacher, whose widths suit quantisers; nobody trained it."""
    path = tmp_path_factory.mktemp("students") / "student"
    student = convert(AutoModelForImageTextToText.from_pretrained(TEACHER), {"output_gate": True})
    student.save_pretrained(path.parent / "zeros")  # the output gate starts as rows of zeros
    shake(student, (*NEW_PARAMETERS, "z_proj.weight"), scale=0.02).save_pretrained(path)
    load_processor(str(TEACHER)).save_pretrained(path)
    return path


def quantised(folder: Path, name: str):
    pytest.importorskip(name.split(",")[0], reason="needs the extra [quantised]")
    return load(str(folder), quantization_config=QUANTISERS[name](torch.float32), device_map="cpu")


@torch.no_grad()
def logits(student: nn.Module) -> torch.Tensor:
    return student(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("name", HERE)
def test_projections_and_mlps_are_quantised_and_nothing_else_of_the_decoder(folder, name, caplog):
    with caplog.at_level(logging.WARNING):
        student = quantised(folder, name)
    rounded = quantised_weights(student)
    decoder = [name for name in rounded if "visual" not in name]
    assert {name.split(".")[-2] for name in decoder} == ROUNDED
    assert not [name for name in rounded if any(part in name for part in (*FLOAT32_PARAMETERS, "lm_head"))]
    assert f"{len(rounded)} of {len([*student.parameters()])} weights are quantised (" in caplog.text


@pytest.mark.parametrize("name", HERE)
def test_a_quantised_student_opens_as_it_was_saved(folder, tmp_path, name):
    student = quantised(folder, name)
    size = weight_bytes(student)
    student.save_pretrained(tmp_path)
    opened = load(str(tmp_path))
    assert quantised_weights(opened) == quantised_weights(student)
    assert weight_bytes(opened) == size < 0.4 * weight_bytes(load(str(folder)))
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert stored == pytest.approx(size, rel=0.02)  # beside it, what bitsandbytes writes in JSON
    assert torch.equal(logits(opened), logits(student))


def test_4_bits_that_have_computed_are_saved_right_or_not_at_all(folder, tmp_path):
    student = quantised(folder, "bitsandbytes, 4 bits")
    before = logits(student)
    try:
        student.save_pretrained(tmp_path)
    except ValueError as error:
        assert "save_pretrained: 4-bit weights must be as they were opened, got 48 packed" in str(error)
        assert not (tmp_path / "model.safetensors").exists() and torch.equal(logits(student), before)
    else:
        assert torch.equal(logits(load(str(tmp_path))), before)


def test_rows_of_zeros_are_refused_in_fp8_unless_they_are_left_precise(folder):
    pytest.importorskip("torchao", reason="needs the extra [quantised]")
    settings = QUANTISERS["torchao, fp8"](torch.float32)
    with pytest.raises(
        ValueError, match=r"quantised weights must be finite, got NaN in \['z_proj'\]"
    ) as refusal:
        load(str(folder.parent / "zeros"), quantization_config=settings)
    settings.modules_to_not_convert = [".*z_proj"]
    assert f"modules_to_not_convert={settings.modules_to_not_convert}" in str(refusal.value)
    student = load(str(folder.parent / "zeros"), quantization_config=settings)
    assert logits(student).isfinite().all()
    assert not [name for name in quantised_weights(student) if "z_proj" in name or "dt_proj" in name]


def test_packed_4_bits_are_refused():
    module = nn.Linear(2, 2)
    refuse_packed(module)
    module.weight.quant_state = type("QuantState", (), {"packing_format_for_cpu": True})()
    with pytest.raises(ValueError, match="got 1 packed for this CPU; open the student again"):
        refuse_packed(module)


def test_one_command_says_what_each_quantiser_costs(folder):
    flags = ["--eval_samples", "4", "--batch_size", "4", "--cpu"]
    title, _, *rows = main(["quantise", str(folder), *flags]).splitlines()
    assert title == "| weights | MiB | accuracy | KL, nats | same first choice |"
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert list(cells) == ["as saved", *QUANTISERS]
    assert cells["as saved"][2:] == ["0.00000", "1.0000"]
    for name in QUANTISERS:
        size, _, kl, _ = cells[name]
        if not size.startswith("not here: "):
            assert float(size) < 0.4 * float(cells["as saved"][0]) and 0 < float(kl) < 1
