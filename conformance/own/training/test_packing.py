"""`--packing`: batches of samples side by side teach what the same samples teach each in a row of its own."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from linmu.reference import Lesson, Objective, attach_teacher, convert
from linmu.reference.demo import TEACHER, DigitsQuestions
from linmu.reference.prompts.chat_collator import ChatCollator
from linmu.reference.prompts.packing_collator import PackingCollator
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.commands.command_line import parse
from linmu.reference.training.commands.main import main
from linmu.reference.training.data.open_data import chat_collator, open_data, open_held_out
from linmu.reference.training.evaluation.held_out import HeldOut
from linmu.reference.training.refusal import RefusedError

from ..student.tiny_checkpoint import shake_mixers
from .flags import steps

IGNORED, ROW = -100, 120
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "position_ids", "linmu_sequence")
ONE_STEP = [*steps(1, 1, 1), "--stages", "i", "--batch_size", "3", "--eval_samples", "1", "--log_every", "1"]
ONE_STEP += ["--calibration_batches", "0", "--cpu"]


@pytest.fixture(scope="module")
def collator() -> ChatCollator:
    return ChatCollator(load_processor(str(TEACHER), padding_side="right"))


@pytest.fixture(scope="module")
def items() -> list[dict]:
    questions = DigitsQuestions("train", 0, 9)
    return [questions[i] | {"name": f"sample {i}"} for i in range(5)]


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    teacher = AutoModelForImageTextToText.from_pretrained(TEACHER, dtype=torch.float64)
    student = shake_mixers(convert(teacher, {"text_window": 8, "window_thw": (2, 2, 2)}))
    attach_teacher(student, teacher)
    return Lesson(student.double(), Objective(1.0, 0.5, 1.0, end_to_end=True))


def test_rows_hold_the_samples_side_by_side(collator, items):
    samples = [collator([item]) for item in items]
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    row_tokens = lengths[0] + max(lengths) + 3
    batch = PackingCollator(collator, row_tokens).with_names(items)
    names, found = batch.pop("names"), {}
    pictures = {"pixel_values": [], "pixel_values_videos": []}
    for row, listed in enumerate(names):
        start = 0
        for number, name in enumerate(listed.split(", ")):
            sample = samples[int(name.split()[1])]
            own = slice(start, start + sample["input_ids"].shape[1])
            for key in ("input_ids", "mm_token_type_ids", "attention_mask"):
                assert torch.equal(batch[key][row, own], sample[key][0]), (key, name)
            labels = sample["labels"][0].clone()
            labels[0] = IGNORED
            assert torch.equal(batch["labels"][row, own], labels)
            assert batch["position_ids"][row, own].tolist() == list(range(own.stop - start))
            assert batch["linmu_sequence"][row, own].unique().tolist() == [number]
            for key in pictures.keys() & sample.keys():
                pictures[key].append(sample[key])
            start, found[name] = own.stop, row
        assert not batch["attention_mask"][row, start:].any()
        assert (batch["labels"][row, start:] == IGNORED).all()
    assert sorted(found) == [f"sample {i}" for i in range(5)] and 1 < len(names) < 5
    for key, given in pictures.items():
        assert torch.equal(batch[key], torch.cat(given))
    assert all(tensor.shape == (len(names), row_tokens) for key, tensor in batch.items() if key in PER_TOKEN)


def test_documents_and_conversations_share_a_row(collator, items):
    """Of a batch with tensors made before, too."""
    document = {"kind": "text", "text": "a document of its own", "name": "document"}
    batch = PackingCollator(collator, 300)([document, collator.encode(items[0]), document])
    text = collator([document])["input_ids"][0]
    first, last = (
        batch["input_ids"][0, batch["linmu_sequence"][0] == number][: len(text)] for number in (0, 2)
    )
    assert torch.equal(first, text) and torch.equal(last, text)
    assert int(batch["attention_mask"].sum()) == 2 * len(text) + collator([items[0]])["input_ids"].shape[1]


def test_a_sample_longer_than_a_row_is_refused(collator, items):
    with pytest.raises(ValueError, match=r"at most the 5 tokens of a row, got .* in sample 0"):
        PackingCollator(collator, 5).with_names(items)


def test_pictures_that_come_in_rows_of_prompts_are_refused(collator, items):
    """Idefics3's: tiles of one prompt cannot stand for those of several."""
    sample = collator.encode(items[0])
    sample["tensors"]["pixel_attention_mask"] = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="a row of tiles for each prompt; train this family without packing"):
        PackingCollator(collator, ROW)([sample])


def test_a_packed_batch_teaches_what_a_padded_one_does(lesson, items):
    """Losses, and gradients of all that is trained, first tokens of samples supervised; two rows, padded."""
    collator = ChatCollator(load_processor(str(TEACHER), padding_side="right"), supervise="all")
    longest = max(collator([item])["input_ids"].shape[1] for item in items)
    found = []
    for collate in (collator, PackingCollator(collator, 3 * longest)):
        lesson.zero_grad()
        terms = lesson(**collate(items))
        terms["loss"].backward()
        grads = {
            n: p.grad.clone() for n, p in lesson.named_parameters() if p.grad is not None and "mixer" in n
        }
        found.append({name: term.detach() for name, term in terms.items()} | grads)
    padded, packed = found
    assert padded.keys() == packed.keys() and len(padded) > 20
    for name, value in padded.items():
        error = (packed[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert error < 1e-10, (name, error)


def test_a_run_may_pack_its_batches(tmp_path, monkeypatch):
    """Three samples a batch, in two rows."""
    shapes, collate = [], PackingCollator.with_names

    def with_names(self, items):
        batch = collate(self, items)
        shapes.append((len(items), *batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(PackingCollator, "with_names", with_names)
    main([*ONE_STEP, "--output", str(tmp_path), "--packing", "--packing_tokens", str(ROW)])
    assert shapes == [(3, 2, ROW)]
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0 < line["loss"] < 2
    assert json.loads((tmp_path / "config.json").read_text())["packing_tokens"] == ROW


@pytest.mark.parametrize("flag", ["--packing_tokens", "--max_length"])
def test_a_bound_below_the_bundled_samples_is_refused_at_the_start(flag):
    config = parse([flag, "60", "--packing"])
    encoder = chat_collator(load_processor(str(TEACHER)), config.samples)
    says = rf"distill: {flag} must be at least the 61 tokens of the demo's sample \d+, got 60; set {flag} 61"
    with pytest.raises(RefusedError, match=says):
        if flag == "--max_length":
            open_held_out(config, config.data, encoder, None)
        else:
            open_data(config, encoder, None, 1)


def test_samples_that_do_not_go_into_a_batch_are_refused_without_a_traceback(
    collator, items, tmp_path, monkeypatch
):
    def refuse(*_):
        raise ValueError("where: pixels must be of one size")

    monkeypatch.setattr(PackingCollator, "with_names", refuse)
    with pytest.raises(RefusedError, match=r"^distill: where: pixels must be of one size$"):
        main([*ONE_STEP, "--output", str(tmp_path), "--packing", "--packing_tokens", str(ROW)])
    monkeypatch.setattr(ChatCollator, "__call__", refuse)
    with pytest.raises(RefusedError, match=r"^distill: where: pixels must be of one size$"):
        next(HeldOut(items, collator, parse([])).batches())


@pytest.mark.parametrize(
    ("flags", "says"),
    (
        (["--packing"], "--packing must come with the tokens of a row, --packing_tokens or --max_length"),
        (["--packing_tokens", "9"], "--packing_tokens must come with --packing, got"),
    ),
)
def test_rows_without_a_length_are_refused(tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit):
        main(["--cpu", "--output", str(tmp_path), *flags])
    assert says in capsys.readouterr().err
