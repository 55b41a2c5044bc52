"""What `--describe` says, its numbers against measured ones, and what memory convert() holds."""

from __future__ import annotations

import re
import runpy
import sys
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig

from linmu.reference import convert
from linmu.reference.demo import TEACHER
from linmu.reference.student.cache import CACHE_NAME
from linmu.reference.student.convert import describe_teacher, main
from linmu.reference.student.cost import active_weights, cache_bytes, count, flops
from linmu.reference.student.model import decoder_layers, mixers

from .tiny_checkpoint import build_teacher, words
from .tiny_families import BUILDERS

SEVEN_BILLION = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "dtype": "bfloat16",
}


def test_seven_billion_parameters_are_described_without_any_weights(tmp_path):
    Qwen2_5_VLConfig(**SEVEN_BILLION).save_pretrained(tmp_path)
    page = describe_teacher(str(tmp_path))
    assert "28 of 28 decoder layers hold M-MATE: width 3584, 28 heads, 4 groups, head dim 128" in page
    assert "8,292,166,656 before, 9,120,847,964 after, 828,681,308 added (10.0%)" in page
    rows = {row.split()[0]: row.split()[1:] for row in page.splitlines()[-4:]}
    assert rows["1,000"][:2] == ["54.7", "57.4"] and rows["1,000,000"][:2] == ["54,687.5", "57.4"]
    teacher, student = ([float(row[column]) for row in rows.values()] for column in (2, 3))
    assert student[0] == student[-1] and teacher[-1] > 10 * student[-1]


def test_the_command_prints_the_page_and_no_warning(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", "--describe", str(TEACHER)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        runpy.run_module("linmu.reference.student.convert", run_name="__main__")
    printed = capsys.readouterr()
    assert printed.out == describe_teacher(str(TEACHER)) + "\n"
    assert "872,064 before, 1,080,004 after" in printed.out
    assert "found in sys.modules" not in printed.err


def test_a_student_and_a_missing_folder_are_no_teachers(tmp_path, capsys):
    convert(build_teacher()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"describe: the configuration must be one .*a student is no teacher"
    ):
        describe_teacher(str(tmp_path))
    with pytest.raises(SystemExit):
        main([])
    assert "--describe" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [None, [1]])
@torch.no_grad()
def test_the_described_cache_is_the_one_that_a_prompt_leaves(layers):
    length, teacher = 20, build_teacher()
    student = convert(teacher, layers=layers)
    sizes = mixers(student)[1].config
    for model, converted in ((teacher, 0), (student, len(mixers(student)))):
        cache = model(input_ids=torch.tensor([words(length, 0)]), use_cache=True)[CACHE_NAME]
        slots = [getattr(layer, "state", None) or layer for layer in cache.layers]
        kept = [slot.tensors if hasattr(slot, "tensors") else (slot.keys, slot.values) for slot in slots]
        floats = [tensor for pair in kept for tensor in pair if tensor.is_floating_point()]
        measured = sum(tensor.numel() * tensor.element_size() for tensor in floats)
        assert measured == cache_bytes(sizes, length, 3, converted, torch.float32)


@torch.no_grad()
def test_the_described_operations_are_those_that_torch_counts():
    """But for biases and norms, and for the half of the square that torch counts although it is masked."""
    length, teacher = 64, build_teacher()
    sizes = mixers(convert(teacher))[0].config
    teacher.set_attn_implementation("eager")  # torch counts matrix products
    with FlopCounterMode(display=False) as counter:
        teacher(input_ids=torch.tensor([words(length, 0)]), use_cache=False)
    masked = 2 * sizes.heads * sizes.head_dim * length**2 * len(decoder_layers(teacher))
    assert counter.get_total_flops() == pytest.approx(
        flops(teacher, sizes, length, 0) * length + masked, rel=0.02
    )


def test_of_experts_only_the_chosen_ones_count():
    teacher = BUILDERS["qwen3_vl_moe"]().teacher
    layer = decoder_layers(teacher)[0]
    assert active_weights(layer) == count(layer) - count(layer.mlp.experts) // 2  # 2 of 4


def test_a_student_holds_the_teachers_memory_and_its_mixers_and_nothing_else():
    teacher = build_teacher()
    student = convert(teacher)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in student.parameters()}
    given = {p.untyped_storage().data_ptr() for p in teacher.parameters()}
    own = {p.untyped_storage().data_ptr() for mixer in mixers(student).values() for p in mixer.parameters()}
    assert held.keys() <= given | own
    new = sum(size for pointer, size in held.items() if pointer not in given)
    assert new == sum(4 * count(mixer) for mixer in mixers(student).values())


def test_a_page_has_a_line_per_length():
    assert len(re.findall(r"^ *1[0,]+ ", describe_teacher(str(TEACHER), [0]), re.MULTILINE)) == 4
