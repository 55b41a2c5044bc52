"""A user's data: every way to write a conversation down, every way to break one, the order they come in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from linmu.reference.demo import TEACHER
from linmu.reference.prompts.chat_collator import ChatCollator
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.data.conversations import Conversations, InOrder, Mixture, skipped
from linmu.reference.training.data.media import Media
from linmu.reference.training.data.sources import open_rows
from linmu.reference.training.data.turns import read_turns

pytestmark = pytest.mark.trial_of_the_reference

ASK = {"role": "user", "content": "What is it?"}
SAY = {"role": "assistant", "content": "7"}


def picture(shade: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, shade, shade))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images, a film, an animation, and a file that is none of these."""
    for shade in range(4):
        picture(40 * shade).save(tmp_path / f"{shade}.png")
    picture(9, 400, 100).save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    frames = [picture(30 * shade) for shade in range(8)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=250)
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 16
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())
    return tmp_path


def write(folder: Path, *rows: dict | str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def asked(*blocks: dict | str) -> list[dict]:
    return [{"role": "user", "content": list(blocks)}, SAY]


BLOCK, PLACE = {"type": "image", "image": "1.png"}, {"type": "image"}
TEXT = {"type": "text", "text": "What is it?"}
WRITTEN = {
    "a block with its image": {"messages": asked(BLOCK, TEXT)},
    "a block and a list": {"messages": asked(PLACE, TEXT), "images": ["1.png"]},
    "a list alone": {"messages": [ASK, SAY], "images": ["1.png"]},
    "a mark in the text": {
        "messages": [ASK | {"content": "<image>\nWhat is it?"}, SAY],
        "images": ["1.png"],
    },
    "LLaVA": {
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "7"},
        ],
        "image": "1.png",
    },
    "a table's empty fields": {
        "messages": asked({"type": "image", "text": None}, TEXT | {"image": None}),
        "images": ["1.png"],
        "videos": None,
    },
}


@pytest.mark.parametrize("row", WRITTEN.values(), ids=WRITTEN)
def test_every_way_to_write_a_conversation_is_the_same_conversation(folder, row):
    (user, assistant) = Conversations(write(folder, row))[0]["messages"]
    image, text = user["content"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert image["image"].getpixel((0, 0)) == (40, 40, 40) and image["image"].mode == "RGB"
    assert text["text"] == "What is it?" and assistant["content"] == [{"type": "text", "text": "7"}]


def test_images_go_to_their_places_in_order():
    row = {
        "messages": [{"role": "user", "content": "<image>a<image>b<video>"}, SAY],
        "images": [1, 2],
        "videos": [3],
    }
    user, _ = read_turns(row)
    found = [block.get("image", block.get("video", block.get("text"))) for block in user["content"]]
    assert found == [1, "a", 2, "b", 3]


@pytest.mark.parametrize(
    "film", ["film.mp4", "film.gif", [f"{i % 4}.png" for i in range(8)]], ids=["mp4", "gif", "frames"]
)
def test_a_video_is_a_film_an_animation_or_frames_and_is_thinned_evenly(folder, film):
    given = {"type": "video", "video": film} | ({} if isinstance(film, str) else {"fps": 4.0})
    path = write(folder, {"messages": asked(given, TEXT)})
    whole = Conversations(path)[0]["messages"][0]["content"][0]
    thinned = Conversations(path, max_frames=4)[0]["messages"][0]["content"][0]
    assert (len(whole["video"]), whole["fps"]) == (8, 4.0)
    assert (len(thinned["video"]), thinned["fps"]) == (4, 2.0)
    kept = [np.asarray(frame) for frame in whole["video"][::2]]
    assert all(map(np.array_equal, map(np.asarray, thinned["video"]), kept))


def test_images_and_frames_shrink_to_max_pixels(folder):
    media = Media(folder, max_pixels=10_000)
    image = media.image("wide.png")
    assert image.width * image.height <= 10_000 and image.width == 4 * image.height
    assert media.image("1.png").size == (16, 16)


BROKEN = {
    "bad JSON": ("{", "JSONDecodeError"),
    "no object": ("[]", "ValueError: a sample must be an object"),
    "no messages": ({"question": "x"}, "must have a list of messages"),
    "no turns": ({"messages": []}, "must have a list of messages"),
    "a user speaks last": ({"messages": [ASK]}, r"roles must be user and assistant in turns.*\['user'\]"),
    "the same role twice": ({"messages": [ASK, ASK, SAY]}, "roles must be"),
    "an unknown role": ({"messages": [ASK | {"role": "tool"}, SAY]}, "roles must be"),
    "a missing file": ({"messages": asked(BLOCK | {"image": "gone.png"})}, "FileNotFoundError.*gone"),
    "a corrupt image": ({"messages": asked(BLOCK | {"image": "broken.png"})}, "broken.png must be an image"),
    "a corrupt film": ({"messages": asked({"type": "video", "video": "broken.png"})}, "must be a video"),
    "no frames": ({"messages": asked({"type": "video", "video": []})}, "must have frames"),
    "fewer images than places": ({"messages": asked(PLACE, PLACE), "images": ["1.png"]}, "got 1 for 2"),
    "more images than places": ({"messages": asked(PLACE), "images": ["1.png"] * 2}, "got 2 for 1"),
    "an unknown block": ({"messages": asked({"type": "audio"})}, "type must be text, image or video"),
    "a text block without text": ({"messages": asked({"type": "text"})}, "must hold a text"),
    "a number as content": ({"messages": [ASK | {"content": 3}, SAY]}, "content must be a text or a list"),
    "the model's placeholder": ({"messages": [ASK | {"content": "<|image_pad|>"}, SAY]}, "no placeholder"),
    "too many tokens": ({"messages": [ASK | {"content": "1 " * 99}, SAY]}, "at most 60 tokens, got"),
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> ChatCollator:
    return ChatCollator(load_processor(str(TEACHER), padding_side="right"), max_length=60)


@pytest.mark.parametrize(("row", "says"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("streaming", [False, True], ids=["listed", "streamed"])
def test_a_broken_sample_is_named_and_refused_or_skipped_and_counted(
    folder, encoder, row, says, streaming, caplog
):
    good = {"messages": [ASK, SAY], "kind": "good"}
    path = write(folder, "", good, row, good)
    report = folder / "report.jsonl"
    named = r"mine.jsonl, line 3: .*" + says
    with pytest.raises(ValueError, match=named):
        Conversations(open_rows(str(path), streaming), prepare=encoder.encode)[1]
    data = Conversations(open_rows(str(path), streaming), "skip", prepare=encoder.encode, report=report)
    assert [data[i]["kind"] for i in (0, 1, 2)] == ["good"] * 3
    data[1]
    assert sum(skipped(report).values()) == 1 and "mine.jsonl, line 3: " in caplog.text


def test_a_data_set_that_is_not_there_or_empty_is_refused(folder):
    (folder / "empty.jsonl").write_text("\n")
    for source in ("gone.jsonl", "./gone", "empty.jsonl"):
        with pytest.raises(ValueError, match=r"open_rows: .*(gone|empty)"):
            open_rows(str(folder / source) if source == "empty.jsonl" else source)


def table(folder: Path) -> datasets.Dataset:
    """Conversations as a Hugging Face data set keeps them, the third with a corrupt image."""
    rows = {
        "messages": [[ASK, SAY] for _ in range(5)],
        "images": [[str(folder / f"{i}.png")] for i in (0, 1)]
        + [[str(folder / "broken.png")]]
        + [[str(folder / f"{i}.png")] for i in (2, 3)],
    }
    return datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("form", ["saved", "parquet", "streamed"])
def test_hugging_face_data_sets_are_read_undecoded_row_by_row(folder, form):
    where = folder / form
    if form == "saved":
        table(folder).save_to_disk(str(where))
    else:
        where.mkdir()
        table(folder).to_parquet(str(where / "train.parquet"))
    data = Conversations(open_rows(str(where), streaming=form == "streamed"))
    shades = [data[i]["messages"][0]["content"][0]["image"].getpixel((0, 0))[0] for i in (0, 1, 3, 4)]
    assert shades == [0, 40, 80, 120]
    with pytest.raises(ValueError, match=rf"{form}, row 2: .*must be an image"):
        data[2]


def numbered(folder: Path, name: str, count: int) -> Path:
    path = folder / name
    path.write_text(
        "".join(json.dumps({"messages": [ASK, SAY], "kind": f"{name[0]}{i}"}) + "\n" for i in range(count))
    )
    return path


def test_a_stream_is_the_same_wherever_it_is_entered(tmp_path):
    path = numbered(tmp_path, "many.jsonl", 30)

    def stream() -> Conversations:
        return Conversations(open_rows(str(path), streaming=True, seed=3))

    whole, later = stream(), stream()
    kinds = [whole[i]["kind"] for i in range(90)]
    assert [later[i]["kind"] for i in (50, 51, 70, 68, 3)] == [kinds[i] for i in (50, 51, 70, 68, 3)]
    for epoch in (kinds[:30], kinds[30:60], kinds[60:]):
        assert sorted(epoch) == sorted(kinds[:30]) and len(set(epoch)) == 30
    assert kinds[:30] != kinds[30:60] != [f"m{i}" for i in range(30)]


def test_a_streams_order_is_not_a_number_that_loader_workers_share(folder, monkeypatch):
    path = write(folder, *({"messages": asked(BLOCK, TEXT), "kind": f"{i}"} for i in range(12)))
    stream, alone = (open_rows(str(path), streaming=True, seed=0) for _ in range(2))
    kinds = [alone.row(i)["kind"] for i in range(20)]
    iterate = datasets.IterableDataset.iter

    def another_worker_is_ahead(data, *arguments, **named):
        stream.data.set_epoch(7)
        return iterate(data, *arguments, **named)

    monkeypatch.setattr(datasets.IterableDataset, "iter", another_worker_is_ahead)
    assert [stream.row(i)["kind"] for i in range(20)] == kinds


@pytest.mark.parametrize("streaming", [False, True], ids=["listed", "streamed"])
def test_loader_workers_change_nothing(folder, encoder, streaming):
    path = write(folder, *({"messages": asked(BLOCK, TEXT), "kind": f"{i}"} for i in range(12)))

    def kinds(workers: int) -> list[list[str]]:
        data = Conversations(open_rows(str(path), streaming, seed=0), prepare=encoder.encode)
        order = InOrder(data, 24, None if streaming else 0)
        loader = torch.utils.data.DataLoader(order, 4, num_workers=workers, collate_fn=list)
        return [[item["kind"] for item in items] for items in loader]

    assert kinds(0) == kinds(2)


def test_a_mixture_draws_by_weight_and_sees_every_sample_of_a_part_once_an_epoch(tmp_path):
    parts = [
        Conversations(numbered(tmp_path, name, count)) for name, count in (("a.jsonl", 40), ("b.jsonl", 7))
    ]
    mixture = Mixture(parts, (3.0, 1.0), seed=1)
    kinds = [mixture[i]["kind"] for i in range(1300)]
    assert [Mixture(parts, (3.0, 1.0), seed=1)[i]["kind"] for i in (1299, 5)] == [kinds[1299], kinds[5]]
    share = sum(kind[0] == "a" for kind in kinds) / len(kinds)
    assert share == pytest.approx(0.75, abs=0.04)
    for part, size in (("a", 40), ("b", 7)):
        own = [kind for kind in kinds if kind[0] == part]
        assert all(len(set(own[i : i + size])) == size for i in range(0, len(own) - size, size))


def test_grouping_by_length_fills_batches_with_samples_of_one_length(folder):
    sizes = [5 + 40 * (i % 7) for i in range(84)]
    rows = [{"messages": [ASK | {"content": "x" * 4 * size}, SAY], "kind": str(size)} for size in sizes]
    data = Conversations(write(folder, *rows))

    def spread(group: int) -> int:
        kinds = [int(InOrder(data, 84, 0, group=group)[i]["kind"]) for i in range(84)]
        assert sorted(kinds) == sorted(sizes)
        batches = [kinds[i : i + 6] for i in range(0, 84, 6)]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread(6) < 0.5 * spread(0)


def test_rough_lengths_follow_text_and_pictures(folder):
    rows = [{"messages": asked({"type": "image", "image": "wide.png"}, TEXT)}, {"messages": asked(TEXT)}, "{"]
    data = Conversations(write(folder, *rows))
    with_image, without, broken = (data.rough_length(i) for i in range(3))
    assert with_image - without == 400 * 100 // 28**2 and broken == 0


def test_padded_samples_are_the_batch_that_the_processor_makes(folder):
    processor = load_processor(str(TEACHER), padding_side="right")
    film = {"type": "video", "video": "film.mp4"}
    rows = [
        {"messages": asked(BLOCK, TEXT)},
        {"messages": [ASK, SAY, ASK, SAY]},
        {"messages": asked(film, BLOCK, {"type": "image", "image": "wide.png"}, TEXT)},
    ]
    data = Conversations(write(folder, *rows))
    items = [data[i] for i in range(3)]
    encoder = ChatCollator(processor)
    got, want = encoder([encoder.encode(item) for item in items]), encoder(items)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_supervising_all_covers_text_and_nothing_else(folder):
    processor = load_processor(str(TEACHER), padding_side="right")
    data = Conversations(write(folder, {"messages": asked(BLOCK, TEXT)}, {"messages": [ASK, SAY]}))
    batch = ChatCollator(processor, supervise="all")([data[0], data[1]])
    supervised = batch["labels"] != -100
    text = batch["attention_mask"].bool() & (batch["mm_token_type_ids"] == 0)
    assert torch.equal(supervised, text) and not supervised.all()
    assert Counter(batch["labels"][supervised].tolist()) == Counter(batch["input_ids"][text].tolist())
