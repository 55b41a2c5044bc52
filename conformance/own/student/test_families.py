"""Every family, from its processor's output to logits: conversion, generation, padding, turns, folders."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from linmu.reference import convert, load
from linmu.reference.student.cache import CACHE_NAME, LinMUCacheLayer
from linmu.reference.student.model import mixers

from ...harness.compare import assert_same
from .tiny_checkpoint import in_fresh_memory, shake_mixers, student_backend
from .tiny_families import BUILDERS, Tiny

pytestmark = pytest.mark.needs("MMATE")

OLD_TRANSFORMERS = Version(transformers.__version__) < Version(
    "5.24"
)  # wants torchvision for Idefics3 images
STEPS = 3
TOLERANCE = 1e-4  # in logits of magnitude 6 to 9, float32


@pytest.fixture(scope="module", params=BUILDERS)
def tiny(request) -> Tiny:
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def student(tiny, backend):
    return shake_mixers(convert(tiny.teacher, backend=student_backend(backend)))


def prompts(tiny: Tiny) -> list[str]:
    """A row with two pictures, a row with one, and a row of text."""
    if not tiny.image:
        return ["a longer prompt of text", "short", "and another"]
    one, *_, other = tiny.sizes
    return [f"see {{{one}}} and {{{other}}} now", f"{{{other}}}?", "no picture"]


def run(student, inputs: dict[str, Tensor], **options: Any):
    settings = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True}
    return student.generate(**inputs, return_dict_in_generate=True, **settings | options)


def step_logits(output) -> Tensor:
    return torch.stack(output.logits, dim=1)


def joined(tiny: Tiny, first: dict[str, Tensor], sequences: Tensor, turn: dict[str, Tensor]):
    """The inputs of a conversation: a prompt, its answer, and another prompt."""
    answered = sequences.shape[1] - first["input_ids"].shape[1]
    whole = {"input_ids": torch.cat([sequences, turn["input_ids"]], dim=1)}
    for name in (first.keys() | turn.keys()) - {"input_ids"}:
        parts = [given.get(name) for given in (first, turn)]
        if name in ("attention_mask", "mm_token_type_ids"):
            missing = torch.zeros_like(turn["input_ids"])
            here, there = (missing if part is None else part for part in parts)
            here = torch.nn.functional.pad(here, (0, answered), value=int(name == "attention_mask"))
            whole[name] = torch.cat([here, there], dim=1)
        else:
            whole[name] = tiny.joined([part for part in parts if part is not None])
    return whole


@torch.no_grad()
def uncached(tiny: Tiny, student, inputs: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """The logits before each generated token, from one forward over everything."""
    turn = {"input_ids": sequences[:, :0]}
    whole = joined(tiny, inputs, sequences, turn)
    return student(**whole, use_cache=False).logits[:, inputs["input_ids"].shape[1] - 1 : -1]


@torch.no_grad()
def test_a_student_without_converted_layers_is_its_teacher_bit_for_bit(tiny):
    student = convert(tiny.teacher, layers=[])
    inputs = [tiny.inputs(row) for row in prompts(tiny)] + ([tiny.video(3)] if tiny.video else [])
    for given in inputs:
        assert torch.equal(student(**given).logits, tiny.teacher(**given).logits)


def test_mixers_take_over_the_familys_attention(tiny):
    student = convert(tiny.teacher)
    for index, mixer in mixers(student).items():
        attention = tiny.teacher.get_decoder().layers[index].self_attn
        given = dict(attention.named_parameters())
        for branch in (mixer.flex_ma, mixer.local_swin) if tiny.image else (mixer.flex_ma,):
            copied = dict(branch.named_parameters())
            assert given.keys() <= copied.keys()
            assert all(torch.equal(copied[name], given[name]) for name in given)


def test_every_step_of_generation_equals_the_uncached_forward(tiny, student):
    rows = [tiny.inputs(row) for row in prompts(tiny)[:2]] + ([tiny.video(3)] if tiny.video else [])
    for inputs in rows:
        output = run(student, inputs)
        wanted = uncached(tiny, student, inputs, output.sequences)
        torch.testing.assert_close(step_logits(output), wanted, rtol=0, atol=TOLERANCE)


def test_a_left_padded_batch_gives_what_each_row_gives_alone(tiny, student):
    together = step_logits(run(student, tiny.inputs(*prompts(tiny))))
    for row, logits in zip(prompts(tiny), together, strict=True):
        alone = step_logits(run(student, tiny.inputs(row)))
        torch.testing.assert_close(logits[None], alone, rtol=0, atol=TOLERANCE)


def test_beams_over_pictures_score_what_the_whole_sequence_scores(tiny, student):
    """Each copy of a row must keep its own pictures, however many there are."""
    rows = prompts(tiny)[:2]
    inputs = tiny.inputs(*rows)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    output = run(student, inputs, **settings)
    for index, sequence in enumerate(output.sequences):
        alone = tiny.inputs(rows[index // 2])
        answer = sequence[inputs["input_ids"].shape[1] :]
        whole = torch.cat([alone["input_ids"], answer[None]], dim=1)
        logits = uncached(tiny, student, alone, whole)[0]
        score = logits.log_softmax(-1).gather(-1, answer[:, None]).sum().item() / len(answer)
        assert math.isclose(score, output.sequences_scores[index].item(), abs_tol=TOLERANCE)


def test_a_second_turn_with_new_pictures_equals_the_whole_conversation(tiny, student):
    second, first = prompts(tiny)[:2]
    for turn in [tiny.inputs(second, seed=1)] + ([tiny.video(2)] if tiny.video else []):
        opening = run(student, tiny.inputs(first))
        whole = joined(tiny, tiny.inputs(first), opening.sequences, turn)
        output = run(student, whole, **{CACHE_NAME: opening[CACHE_NAME]})
        wanted = uncached(tiny, student, whole, output.sequences)
        torch.testing.assert_close(step_logits(output), wanted, rtol=0, atol=TOLERANCE)


def test_a_second_turn_may_pass_its_new_pictures_alone(tiny, student):
    """With the whole conversation's ids and mask, as the stock models take it."""
    second, first = prompts(tiny)[:2]
    for turn in [tiny.inputs(second, seed=1)] + ([tiny.video(2)] if tiny.video else []):
        opening = run(student, tiny.inputs(first))
        whole = joined(tiny, tiny.inputs(first), opening.sequences, turn)
        like_ids = ("input_ids", "attention_mask", "mm_token_type_ids")
        new = {name: whole[name] if name in like_ids else value for name, value in turn.items()}
        new["attention_mask"] = whole["attention_mask"]
        cache = {CACHE_NAME: opening[CACHE_NAME]}
        output = run(student, {name: whole[name] if name in like_ids else new[name] for name in new}, **cache)
        wanted = uncached(tiny, student, whole, output.sequences)
        torch.testing.assert_close(step_logits(output), wanted, rtol=0, atol=TOLERANCE)


def test_a_first_turns_token_types_are_enough_to_continue(tiny, student):
    first = tiny.inputs(prompts(tiny)[0])
    opening = run(student, first)
    pixels = [name for name in first if name.startswith("pixel")]
    rest = {name: value for name, value in first.items() if name not in pixels or tiny.name == "idefics3"}
    kept = {name: value for name, value in rest.items() if name in ("mm_token_type_ids", "image_grid_thw")}
    whole = kept | {"input_ids": opening.sequences, "attention_mask": torch.ones_like(opening.sequences)}
    output = run(student, whole, **{CACHE_NAME: opening[CACHE_NAME]})
    wanted = uncached(tiny, student, first, output.sequences)[:, STEPS:]
    torch.testing.assert_close(step_logits(output), wanted, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_placeholder_that_was_sampled_is_text(tiny, student):
    """In a row without a picture, and in a batch beside rows that have one."""
    if not tiny.image:
        return
    drawn = torch.tensor([[5, 6, tiny.teacher.config.image_token_id, 7]])
    assert student.vision_layout(None, {"input_ids": drawn}) is None
    zeros = {"mm_token_type_ids": torch.zeros_like(drawn)}
    assert student.vision_layout(None, {"input_ids": drawn} | zeros) is None
    with pytest.raises(ValueError, match="every run of image tokens must have a grid"):
        student.vision_layout(None, {"input_ids": drawn, "mm_token_type_ids": zeros["mm_token_type_ids"] + 1})
    settings = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": None}
    others = [i for i in range(tiny.teacher.config.get_text_config().vocab_size) if i not in drawn[0, 2]]
    for use_cache in (True, False):
        only = {"suppress_tokens": others, "use_cache": use_cache}
        output = student.generate(drawn[:, :2], attention_mask=torch.ones(1, 2), **settings | only)
        assert (output[0, 2:] == drawn[0, 2]).all()


def test_placeholders_are_where_the_layout_has_vision_or_a_newline(tiny, student):
    inputs = tiny.inputs(*prompts(tiny))
    found = student.placeholder_mask(inputs["input_ids"])
    layout = student.vision_layout(None, inputs)
    if layout is None:
        assert not tiny.image and not found.any()
    else:
        assert type(layout) is student.linmu_backend.VisionLayout  # checked once
        assert (found | ~layout.is_vision).all()
        newlines = (found & ~layout.is_vision).sum()
        assert (newlines > 0) == (tiny.name == "llava_onevision")


def test_a_prompt_is_read_in_chunks_that_cut_no_span(tiny, student):
    """Older transformers, which would lose the pictures of later chunks, refuse all chunks but of text."""
    inputs = tiny.inputs("see {tall} now" if tiny.image else "a longer prompt of text")
    is_picture = inputs["input_ids"][0] == getattr(tiny.teacher.config, "image_token_id", -1)
    last = int(is_picture.nonzero()[-1]) if tiny.image else 4
    sound = not tiny.image or "mm_encoder_outputs" in inspect.signature(student.forward).parameters
    if sound:
        whole, chunks = (step_logits(run(student, inputs, prefill_chunk_size=n)) for n in (None, last + 1))
        torch.testing.assert_close(chunks, whole, rtol=0, atol=TOLERANCE)
    if tiny.image:
        with pytest.raises(ValueError, match="generate: prefill"):
            run(student, inputs, prefill_chunk_size=last - 1 if sound else last + 1)


def test_a_chunk_that_ends_between_two_frames_is_refused():
    tiny = BUILDERS["qwen3_vl"]()
    student, inputs = convert(tiny.teacher, backend="optimized"), tiny.video(3)
    frames = (inputs["input_ids"][0] == tiny.teacher.config.video_token_id).nonzero().flatten()
    with pytest.raises(ValueError, match="generate: prefill"):
        run(
            student, inputs, prefill_chunk_size=int(frames[5]) + 2
        )  # after a frame, before the next one's time


def test_a_hybrid_keeps_keys_and_values_in_the_layers_that_stay(tiny, backend):
    student = shake_mixers(convert(tiny.teacher, layers=[1], backend=student_backend(backend)))
    inputs = tiny.inputs(prompts(tiny)[0])
    output = run(student, inputs)
    wanted = uncached(tiny, student, inputs, output.sequences)
    torch.testing.assert_close(step_logits(output), wanted, rtol=0, atol=TOLERANCE)
    layers = output[CACHE_NAME].layers
    assert [isinstance(layer, LinMUCacheLayer) for layer in layers] == [False, True, False]
    assert layers[0].keys.shape[2] == output.sequences.shape[1] - 1


@torch.no_grad()
def test_pictures_count_and_text_before_them_does_not_see_them(tiny, student):
    row = prompts(tiny)[0]
    one, other = (student(**tiny.inputs(row, seed=seed)).logits for seed in (0, 1))
    assert torch.equal(one[:, :4], other[:, :4])
    assert ((one[:, -1] - other[:, -1]).abs().max() > 1e-2) == bool(tiny.image)


@torch.no_grad()
def test_a_students_folder_opens_as_the_student(tiny, student, backend, tmp_path, monkeypatch):
    student.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    if not (OLD_TRANSFORMERS and tiny.name in ("idefics3", "smolvlm")):
        auto_processor = AutoProcessor if tiny.image else AutoTokenizer
        again = replace(tiny, processor=auto_processor.from_pretrained(tmp_path))
        got, want = (given.inputs(prompts(tiny)[0])["input_ids"] for given in (again, tiny))
        assert torch.equal(got, want)
    inputs = tiny.inputs(prompts(tiny)[0])
    wanted = student(**inputs).logits
    again = in_fresh_memory(load(tmp_path, linmu_backend=student_backend(backend)))
    assert torch.equal(again(**inputs).logits, wanted)
    monkeypatch.setenv("LINMU_BACKEND", backend.name.partition("@")[0].rpartition(".")[2])
    auto_class = AutoModelForImageTextToText if tiny.image else AutoModelForCausalLM
    opened = auto_class.from_pretrained(tmp_path)
    assert type(opened) is type(student)
    device = backend.name.partition("@")[2]
    if not device:  # of a device, only what the tests build computes there: what is opened does not
        assert torch.equal(in_fresh_memory(opened)(**inputs).logits, wanted)
    assert_same({"logits": opened(**inputs).logits}, {"logits": wanted}, tiny.name)
