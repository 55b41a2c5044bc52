"""The teacher that sees of a Llama's decoder: its questions against a slow reader, its parts, its command."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linmu.reference.demo import TEACHER, large_questions, train_watcher
from linmu.reference.demo.build_teacher import MERGE, write_preprocessing
from linmu.reference.demo.build_vlm import (
    TINY_TOWER,
    axes_of_pairs,
    build_vlm,
    random_decoder,
    with_vision_tokens,
)
from linmu.reference.demo.digits import BLANK
from linmu.reference.demo.large_questions import LARGE_KINDS, LargeQuestions
from linmu.reference.demo.large_scenes import LEVELS, further_questions
from linmu.reference.demo.packed_vision import pack_vision
from linmu.reference.demo.train_teacher import TrainingCollator
from linmu.reference.demo.vlm_teacher import LARGEST, build, learnt, make, open_decoder, parse
from linmu.reference.prompts.chat_collator import IGNORED, ChatCollator
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.data.conversations import Conversations

pytestmark = pytest.mark.trial_of_the_reference

KIND_BY_WORDS = {
    "left of": "row", "right of": "row", "above": "column", "below": "column", "Is there": "there",
    "How many": "count", "largest": "extreme", "smallest": "extreme", "comes": "order", "changes": "changed",
    "first moment": "again",
}  # fmt: skip
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(Llama, model, its folder): two random layers."""
    torch.manual_seed(0)
    decoder, tokenizer = random_decoder()
    tokenizer, folder = with_vision_tokens(tokenizer), tmp_path_factory.mktemp("vlm")
    model = build_vlm(decoder, tokenizer, TINY_TOWER).eval()
    torch.nn.init.normal_(model.model.visual.merger.mlp[-1].weight)
    write_preprocessing(folder, tokenizer, LARGEST)
    model.save_pretrained(folder)
    return decoder, model, folder


def read_slowly(kind: str, question: str, grid: np.ndarray) -> str:
    """The answer of a person who looks at a grid (T, Y, X)."""
    asked = [int(numeral) for numeral in re.findall(r"\d", question)]
    if kind in ("count", "flashes"):
        return str(int((grid == asked[0]).sum()))
    if kind == "extreme":
        shown = grid[grid != BLANK]
        return str(shown.max() if "largest" in question else shown.min())
    if kind == "again":
        (first,) = grid[0][grid[0] != BLANK]
        return "yes" if first in grid[-1] else "no"
    if kind == "there":
        return "yes" if asked[0] in grid else "no"
    if kind == "order":
        shown = grid[grid != BLANK]  # moment after moment
        return str(shown[-1] if "last" in question else shown[0])
    if kind == "changed":
        ((t, y, x),) = np.argwhere(grid[1:] != grid[:-1])
        return str(grid[t + 1, y, x])
    ((t, y, x),) = np.argwhere(grid == asked[0])
    dy, dx = next(step for words, step in STEPS.items() if words in question)
    return str(grid[t, y + dy, x + dx])


def kind_of(question: str) -> str:
    """What it asks for, by its words."""
    return next(kind for words, kind in KIND_BY_WORDS.items() if words in question)


@pytest.mark.parametrize(("level", "count"), [("short", 300), ("middle", 60), ("long", 12)])
def test_answers_are_what_the_grid_shows(level, count):
    questions = LargeQuestions(level, "train", 3)
    items, grids, seen = questions.__getitems__(range(count)), questions.grids(range(count)), set()
    for item, grid in zip(items, grids, strict=True):
        (question, block), (answer,) = (turn["content"] for turn in item["messages"])
        assert answer["text"] == read_slowly(item["kind"], question["text"], grid)
        assert grid.shape == LEVELS[level][block["type"] == "video"]
        seen.add(item["kind"])
    assert seen <= set(LARGE_KINDS) and (level == "long" or seen == set(LARGE_KINDS))
    assert np.prod(grids[0].shape) == {"short": 64, "middle": 512, "long": 4032}[level]


@pytest.mark.parametrize("level", LEVELS)
def test_every_turn_of_several_asks_something_else_and_is_right(level):
    """The first is of the item's kind, before the picture; later ones are words alone."""
    count, each = (60, 8) if level != "long" else (4, 8)
    questions = LargeQuestions(level, "train", 3, each=each)
    items, grids, seen = questions.__getitems__(range(count)), questions.grids(range(count)), set()
    for item, grid in zip(items, grids, strict=True):
        users, assistants = item["messages"][::2], item["messages"][1::2]
        asked = [turn["content"][0]["text"] for turn in users]
        assert [turn["role"] for turn in item["messages"]] == ["user", "assistant"] * each
        assert len({*asked}) == each and {len(turn["content"]) for turn in users[1:]} == {1}
        kinds = [item["kind"], *map(kind_of, asked[1:])]
        answers = [turn["content"][0]["text"] for turn in assistants]
        assert answers == [read_slowly(k, q, grid) for k, q in zip(kinds, asked, strict=True)]
        seen.update(kinds[1:])
    assert questions[1]["messages"][0]["content"][0] == items[1]["messages"][0]["content"][0]
    assert level == "long" or seen >= {"there", "count", "extreme", "row", "order"}


def test_later_answers_cannot_be_guessed():
    """Most digits are absent or appear once: of questions drawn alike, 2 would answer 0.08."""
    items = LargeQuestions("middle", "train", 1, kinds=("there", "count"), each=3).__getitems__(range(150))
    later = [turn["content"][0]["text"] for item in items for turn in item["messages"][3::2]]
    for answers, least, most in ((("yes", "no"), 0.35, 0.65), (("0", "1", "2"), 0.15, 0.45)):
        counts = [later.count(answer) for answer in answers]
        assert min(counts) > least * sum(counts) and max(counts) < most * sum(counts), (answers, counts)


def test_a_question_of_one_answer_only_is_asked():
    """Nothing is beside, first or last where two are; fewer questions than wanted if no more can be asked."""
    grid = np.full((1, 4, 4), BLANK)
    grid[0, 1, 1:3] = 7, 3
    asked = further_questions(grid, "Which digit is left of the 3?", ("row", "column"), np.zeros((5, 3)))
    assert asked == [("Which digit is right of the 7?", "3")]
    grid[0, 3, 3] = 3  # a second
    assert further_questions(grid, "", ("row",), np.zeros((5, 3))) == [
        ("Which digit is right of the 7?", "3")
    ]
    film = np.stack([grid[0], grid[0]])
    assert further_questions(film, "", ("order", "changed", "again"), np.zeros((5, 3))) == []


def test_every_turn_is_supervised(built):
    """Eight answers, each with its end of turn; the dry run counts these labels."""
    processor = load_processor(built[2])
    items = LargeQuestions("short", each=8).__getitems__(range(3))
    for item, labels in zip(items, ChatCollator(processor)(items)["labels"], strict=True):
        answers = [turn["content"][0]["text"] for turn in item["messages"][1::2]]
        taught = processor.tokenizer.decode(labels[labels != IGNORED])
        assert len(answers) == 8 and taught == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_every_answer_is_as_likely_as_the_others():
    """An answer that can be guessed needs no looking."""
    for kind, share in {
        "row": 0.2,
        "column": 0.2,
        "there": 0.6,
        "count": 0.35,
        "extreme": 0.2,
        "changed": 0.2,
        "order": 0.2,
        "again": 0.6,
    }.items():
        answers = [
            answer for _, answer in LargeQuestions("short", "train", 1, kinds=(kind,)).texts(range(400))
        ]
        assert max(answers.count(answer) for answer in set(answers)) < share * len(answers), kind


def test_unknown_levels_and_kinds_are_refused():
    with pytest.raises(ValueError, match="level must be among"):
        LargeQuestions("endless")
    with pytest.raises(ValueError, match="LargeQuestions: kinds must be among"):
        LargeQuestions("long", kinds=("cell",))
    with pytest.raises(ValueError, match="each must be at least 1, got 0"):
        LargeQuestions("long", each=0)


def test_questions_are_written_as_distill_reads_them(tmp_path):
    counts = {"short": 5, "middle": 0, "long": 1, "held-out": 2, "held-out-level": "short", "workers": 1}
    counts["questions-each"], asked = 2, ("row", "order")
    flags = [part for name, value in counts.items() for part in (f"--{name}", str(value))]
    large_questions.main(["--output", str(tmp_path), *flags, "--kinds", *asked])
    rows = Conversations(tmp_path / "train.jsonl")
    assert len(rows) == 6 and len(Conversations(tmp_path / "held_out.jsonl")) == 2
    held_out = Conversations(tmp_path / "held_out.jsonl")
    assert [len(held_out[i]["messages"]) for i in range(len(held_out))] == [2, 2]
    wanted = LargeQuestions("short", "train", 1, kinds=asked, each=2).__getitems__(range(5))
    assert [len(rows[i]["messages"]) for i in range(5)] == [len(item["messages"]) for item in wanted]
    assert max(len(item["messages"]) for item in wanted) == 4
    for row, item in zip((rows[i] for i in range(5)), wanted, strict=True):
        (_, got), (_, block) = (sample["messages"][0]["content"] for sample in (row, item))
        assert row["kind"] == f"{item['kind']}, short"
        frames = [np.asarray(frame) for frame in (got.get("video") or [got["image"]])]
        own = block["video"] if block["type"] == "video" else [np.asarray(block["image"])]
        assert np.array_equal(np.stack(frames), np.stack(own)) and got.get("fps") == block.get("fps")


def test_text_is_what_the_llama_made_of_it(built):
    decoder, model, _ = built
    ids = torch.arange(40).reshape(2, 20) * 7 % decoder.config.vocab_size
    with torch.no_grad():
        want, got = decoder.eval()(ids).logits, model(ids).logits
    torch.testing.assert_close(got[..., : want.shape[-1]], want, rtol=0, atol=1e-5)


def test_every_axis_has_fast_pairs_and_slow_ones():
    for pairs in (8, 32):
        axes = [axis % 3 for axis, count in enumerate(axes_of_pairs(pairs)) for _ in range(count)]
        assert len(axes) == pairs and len(axes_of_pairs(pairs)) % 3 == 0
        assert {*axes[:3]} == {*axes[-3:]} == {0, 1, 2}


def test_another_decoder_is_refused():
    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True))
    with pytest.raises(ValueError, match="Llama without biases"):
        build_vlm(decoder, with_vision_tokens(random_decoder()[1]), TINY_TOWER)


def test_packed_tower_and_positions_equal_the_stock_model(built):
    """Pictures of several windows and films of several moments, of one batch."""
    _, model, folder = built
    batch = TrainingCollator(folder, MERGE)(LargeQuestions("middle").__getitems__(range(4)))
    grids = batch["image_grid_thw"], batch["video_grid_thw"]
    known = {name: value for name, value in batch.items() if "pixel" not in name and name != "labels"}
    positions, real = known.pop("position_ids"), batch["attention_mask"].bool()
    assert torch.equal(positions[:, real], model.model.get_rope_index(**known)[0][:, real])
    packed = type(model)(copy.deepcopy(model.config)).eval()
    packed.load_state_dict(model.state_dict())
    pack_vision(packed)
    for pixels, grid in zip((batch["pixel_values"], batch["pixel_values_videos"]), grids, strict=True):
        with torch.no_grad():
            want, got = (m.model.visual(pixels, grid_thw=grid).pooler_output for m in (model, packed))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_command_makes_a_teacher(tmp_path):
    few = ["--steps", "1", "--most-in-batch", "1", "--eval-samples", "1", "--log-every", "1"]
    few += ["--questions-each", "1", "3", "2", "--kinds", "row", "there", "order"]
    result = make(parse(["random", "--output", str(tmp_path), *few]))
    assert result == json.loads((tmp_path / "accuracy.json").read_text())
    assert result["steps"] == dict.fromkeys(("cells", *LEVELS), 1)
    assert {*result["kinds"]} <= {"row", "there", "order"}


def test_a_teacher_is_trained_further_from_its_own_weights(built, tmp_path):
    _, model, folder = built
    further, _ = build(parse(["random", "--output", str(tmp_path), "--start", str(folder)]))
    saved = model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in further.state_dict().items())


def test_a_kind_that_was_not_learnt_is_asked_no_more():
    measured = {"all": 0.7, "row": 0.95, "there": 0.9, "count": 0.2}
    asked = ("row", "there", "count", "again")  # `again` was not among the few that were measured
    assert learnt(measured, asked, 0.9) == ("row", "there")
    assert learnt(measured, asked, 0.99) == ("row",)  # a teacher of no kind could not be measured


@pytest.mark.parametrize(
    ("read", "flags", "told"),
    [
        (large_questions.main, ["--workers", "0"], "--workers: must be a whole number of at least 1, got 0"),
        (large_questions.main, ["--long", "-2"], "--long: must be a whole number of at least 0, got -2"),
        (parse, ["random", "--steps", "many"], "--steps: must be a whole number of at least 1, got many"),
        (parse, ["random", "--seconds", "1", "1", "1", "nan"], "a finite number of seconds > 0, got nan"),
        (parse, ["random", "--output", __file__], f"must be a folder that can be written, got {__file__}"),
        (train_watcher.main, ["in", "out", "--films", "0"], "--films: must be a whole number of at least 1"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_as_it_is_read(read, flags, told, capsys):
    with pytest.raises(SystemExit):
        read(flags)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"), [("gone.gguf", "one that opens, got gone.gguf"), (TEACHER, "a Llama")]
)
def test_a_decoder_that_cannot_be_is_refused_by_name(name, told):
    with pytest.raises(SystemExit, match=f"DECODER must be {told}"):
        open_decoder(str(name))
