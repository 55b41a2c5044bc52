"""Data as people have them: other forms of a conversation, odd files, and what must be refused by name."""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from linmu.reference.demo import TEACHER
from linmu.reference.prompts.chat_collator import GROUNDING, ChatCollator, control_tokens
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.commands.command_line import parse
from linmu.reference.training.data.conversations import BrokenSampleError, Conversations, Mixture, skipped
from linmu.reference.training.data.films import MissingPackageError
from linmu.reference.training.data.open_data import open_data, parse_weight
from linmu.reference.training.data.sources import Stream, StreamEndedError, open_rows
from linmu.reference.training.data.turns import read_turns
from linmu.reference.training.refusal import RefusedError

from .test_media import WIDTH, corners, shades, write_film

pytestmark = pytest.mark.trial_of_the_reference

ASK, SAY = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "7"}
TEXT = {"type": "text", "text": "What is it?"}
GOOD = {"messages": [ASK, SAY], "kind": "good"}


@pytest.fixture
def folder(tmp_path) -> Path:
    corners().save(tmp_path / "a.png")
    write_film(tmp_path / "film.mp4", shades(4))
    return tmp_path


@pytest.fixture(scope="module")
def collator() -> ChatCollator:
    return ChatCollator(load_processor(str(TEACHER), padding_side="right"))


def write(path: Path, *rows: dict | str | bytes) -> Path:
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines))
    return path


def asked(*blocks: dict) -> list[dict]:
    return [{"role": "user", "content": list(blocks)}, SAY]


def one_image(folder: Path, row: dict) -> tuple[Image.Image, list[dict]]:
    (item,) = (Conversations(str(write(folder / "one.jsonl", row)))[0],)
    user, assistant = item["messages"][-2:]
    assert assistant["content"] == [{"type": "text", "text": "7"}]
    image, text = user["content"]
    assert text == TEXT and image.keys() == {"type", "image"}
    return image["image"], item["messages"]


def ways_to_name(path: Path) -> dict[str, dict]:
    text = base64.b64encode(path.read_bytes()).decode()
    url = f"data:image/png;base64,{text}"
    return {
        "path": {"type": "image", "path": path.name},
        "url": {"type": "image", "url": path.as_uri()},
        "url, a path": {"type": "image", "url": str(path)},
        "base64": {"type": "image", "base64": text},
        "data URL": {"type": "image", "image": url},
        "OpenAI": {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        "OpenAI, a text": {"type": "image_url", "image_url": path.as_uri()},
        "OpenAI, answers": {"type": "input_image", "image_url": url},
        "Qwen": {"image": path.name},
        "a table's": {
            "type": "image",
            "image": {"path": str(path), "bytes": None},
            "url": None,
            "text": None,
        },
    }


@pytest.mark.parametrize("way", ways_to_name(Path(__file__).absolute()))
def test_a_block_names_its_image_as_chat_templates_and_openai_do(folder, way):
    block = ways_to_name((folder / "a.png").absolute())[way]
    image, _ = one_image(folder, {"messages": asked(block, TEXT)})
    assert np.array_equal(np.asarray(image), np.asarray(corners()))


def test_a_block_names_its_video_as_chat_templates_do(folder):
    frames = ["a.png"] * 4
    for block in (
        {"type": "video", "video": "film.mp4"},
        {"type": "video", "path": "film.mp4"},
        {"type": "video", "url": (folder / "film.mp4").as_uri()},
        {"type": "video_url", "video_url": {"url": "film.mp4"}},
        {"type": "video", "video": frames, "fps": 4},
        {"video": "film.mp4"},
    ):
        data = Conversations(str(write(folder / "one.jsonl", {"messages": asked(block, TEXT)})))
        video = data[0]["messages"][0]["content"][0]
        assert video["type"] == "video" and len(video["video"]) == 4 and video["fps"] == 4.0


FORMS = {
    "prompt and completion": {"prompt": "<image>\nWhat is it?", "completion": "7", "images": ["a.png"]},
    "conversational prompt and completion": {"prompt": [ASK], "completion": [SAY], "image": "a.png"},
    "a mark in a text block": {
        "messages": asked({"type": "text", "text": "<image>What is it?"}), "images": ["a.png"],
    },
    "LLaVA's list of files": {
        "conversations": [
            {"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "7"},
        ],
        "image": ["a.png"],
    },
    "a system prompt beside": {"messages": [ASK, SAY], "image": "a.png", "system": "Be brief."},
    "null beside a value": {
        "messages": [ASK | {"from": None, "value": None, "weight": None}, SAY],
        "image": "a.png", "images": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_other_forms_are_the_same_conversation(folder, row):
    image, messages = one_image(folder, row)
    assert np.array_equal(np.asarray(image), np.asarray(corners()))
    assert [m["role"] for m in messages] == ["system"] * ("system" in row) + ["user", "assistant"]


def test_answers_in_a_prompt_are_context(collator):
    def learnt(row: dict) -> str:
        labels = collator.encode({"kind": "all", "messages": read_turns(row)})["tensors"]["labels"][0]
        return collator.processor.tokenizer.decode(labels[labels != -100])

    turns = [ASK, SAY | {"content": "11"}, ASK]
    assert learnt({"messages": [*turns, SAY]}) == "11<|im_end|>7<|im_end|>"
    assert learnt({"prompt": turns, "completion": [SAY]}) == "7<|im_end|>"
    assert (
        learnt({"messages": [ASK, SAY | {"content": "11", "weight": 0}, ASK, SAY | {"weight": 1}]})
        == "7<|im_end|>"
    )


def test_a_mark_for_an_image_may_stand_for_a_video(folder):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "7"}]
    for beside in ({"video": "film.mp4"}, {"videos": ["film.mp4"]}):
        user, _ = read_turns({"conversations": turns} | beside)
        assert user["content"] == [{"type": "video", "video": "film.mp4"}, TEXT]
    both = {"conversations": [turns[0] | {"value": "<image><video>What is it?"}, turns[1]]}
    user, _ = read_turns(both | {"video": "film.mp4", "image": "a.png"})
    assert [block["type"] for block in user["content"]] == ["image", "video", "text"]


PIXELS = np.full((16, 16, 3), 200, np.uint8).tolist()


def test_a_singular_key_means_one_item(folder):
    user, _ = read_turns({"messages": [ASK, SAY], "image": PIXELS})
    assert [block["type"] for block in user["content"]] == ["image", "text"]
    user, _ = read_turns({"messages": [ASK, SAY], "video": ["a.png"] * 4})
    assert [block["type"] for block in user["content"]] == ["video", "text"]
    for row in ({"image": PIXELS}, {"images": [PIXELS]}):
        image, _ = one_image(folder, {"messages": [ASK, SAY]} | row)
        assert image.size == (16, 16) and image.getpixel((3, 3)) == (200, 200, 200)
    for video in (["a.png"] * 4, [PIXELS] * 4):
        data = Conversations(str(write(folder / "one.jsonl", {"messages": [ASK, SAY], "video": video})))
        (block, _) = data[0]["messages"][0]["content"]
        assert len(block["video"]) == 4


@pytest.mark.parametrize("key", ["max_pixels", "max_frames", "min_pixels"])
def test_the_bounds_of_a_block_are_kept(folder, key):
    block = {"type": "video", "video": "film.mp4", "max_pixels": 400, "max_frames": 2}
    if key == "min_pixels":
        block = {"type": "video", "video": "film.mp4", "min_pixels": 40_000}
    data = Conversations(str(write(folder / "one.jsonl", {"messages": asked(block, TEXT)})))
    frames = data[0]["messages"][0]["content"][0]["video"]
    area = frames[0].width * frames[0].height
    assert len(frames) == 2 and area <= 400 if key != "min_pixels" else area >= 40_000


def image(**keys) -> list[dict]:
    return asked({"type": "image", "image": "a.png"} | keys)


def video(**keys) -> list[dict]:
    return asked({"type": "video", "video": "film.mp4"} | keys)


REFUSED = {
    "two images in one block": (image(path="a.png"), "hold one image"),
    "a block's frames chosen elsewhere": (video(nframes=8), "must not ask for nframes"),
    "a block's own size": (image(resized_height=8), "must not ask for resized_height"),
    "a bound as a text": (image(max_pixels="400"), "max_pixels must be a whole number"),
    "a server": (image(image="https://example.org/a.png"), "download it first"),
    "a list as a block": ([{"role": "user", "content": [["a"]]}, SAY], "a block must be an object"),
    "a type that is a list": (asked({"type": ["image"]}), "type must be"),
    "a role that is a list": ([ASK | {"role": ["user"]}, SAY], "roles must be"),
    "a role that is a number": ([ASK | {"role": 3}, SAY], "roles must be"),
    "half a weight": ([ASK, SAY | {"weight": 0.5}], "weight must be 0"),
    "tools called": ([ASK, SAY | {"tool_calls": [{}]}], "tool_calls"),
    "content that is NaN": ([ASK | {"content": float("nan")}, SAY], "got float"),
    "an fps of 0": (video(fps=0), "fps must be a finite number > 0, got 0"),
    "an fps below 0": (video(video=["a.png"], fps=-2), "got -2"),
    "an fps that is NaN": (video(fps=float("nan")), "got nan"),
    "an fps without end": (video(fps=float("inf")), "got inf"),
    "an fps as a text": (video(fps="25"), "got '25'"),
    "a pixel of 300": (image(image=[[[300, 0, 0]]]), "uint8, 0 to 255"),
    "pixels that are floats": (image(image=[[[0.5, 0.5, 0.5]]]), "got float64"),
    "frames of several sizes": (video(video=["a.png", PIXELS]), "of one size"),
    "the end of a turn in an answer": ([ASK, SAY | {"content": "7<|im_end|>8"}], r"control token.*im_end"),
    "a turn inside a question": ([ASK | {"content": "<|im_start|>assistant\n9"}, SAY], "control token"),
    "a placeholder in a text block": (asked({"type": "text", "text": "<|video_pad|>"}), "control token"),
}  # fmt: skip
ROWS = {name: ({"messages": messages}, says) for name, (messages, says) in REFUSED.items()} | {
    "brackets without end": ("[" * 100_000, "RecursionError"),
    "a byte that is not UTF-8": (json.dumps(GOOD).encode().replace(b"W", b"\xff\xfe"), "UnicodeDecode"),
    "a number": ("7", "must be an object, got int|must be an object with messages, got int"),
    "tools": (GOOD | {"tools": [{}]}, "must hold its tools in its system turn"),
    "an image and others": (GOOD | {"image": "a.png", "images": ["b.png"]}, "image or images, got both"),
    "a kind that is a list": (GOOD | {"kind": ["a"]}, "kind must be a name"),
    "a kind that is NaN": (GOOD | {"kind": float("nan")}, "kind must be a name, got nan"),
    "half a character": (GOOD | {"image": "\ud83d.png"}, r"FileNotFoundError: .ud83d.png must exist"),
    "half a character of text": ({"messages": [ASK | {"content": "\ud83d"}, SAY]}, "half of a surrogate"),
    "a name of two lines": (GOOD | {"image": "a\nb\0.png"}, r"a.nb.x00.png must exist"),
    "a prompt alone": ({"prompt": "a"}, "a prompt and a completion, or a text, got keys"),
    "an fps of a row": (GOOD | {"video": "film.mp4", "fps": 0}, "got 0"),
    "a base64 image": (GOOD | {"image": "data:image/png;base64," + "A" * 400_000}, r"\(400022 characters\)"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "says"), ROWS.values(), ids=ROWS)
def test_an_odd_sample_is_named_or_skipped_and_streams_say_the_same(folder, collator, row, says):
    path = write(folder / "mine.jsonl", GOOD, row, GOOD)
    complaints = []
    for streaming in (False, True):
        data = Conversations(open_rows(str(path), streaming), prepare=collator.encode)
        with pytest.raises(ValueError, match=r"mine.jsonl, line 2: .*(" + says + ")") as caught:
            data[1]
        complaints.append(str(caught.value))
        assert len(complaints[-1]) < 900 and complaints[-1].isprintable()
        report = folder / f"{streaming}.jsonl"
        data = Conversations(open_rows(str(path), streaming), "skip", prepare=collator.encode, report=report)
        assert [data[i]["name"][-6:] for i in (0, 1, 2)] == ["line 1", "line 3", "line 3"]
        data[1]
        assert sum(skipped(report).values()) == 1 == len(report.read_text().splitlines())
        assert streaming or data.rough_length(1) >= 0  # --group_by_length asks every sample
    assert complaints[0] == complaints[1]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["a.png", "film.mp4", "<image>", "user", "assistant", "text", "image"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["type", "text", "image", "role", "content", "path", "url"]), inner),
    max_leaves=6,
)  # fmt: skip
SAMPLES = [
    {"messages": asked({"type": "image", "image": "a.png"}, TEXT), "kind": "x"},
    {
        "conversations": [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}],
        "image": "a.png",
    },
    {"prompt": "a", "completion": "b", "videos": [["a.png", "a.png"]], "fps": 2.0, "system": "c"},
]


def parts_of(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The ways to all parts of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from parts_of(part, (*path, key))


@given(data=st.data(), sample=st.sampled_from(SAMPLES), junk=ANYTHING)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_sample_it_is_read_or_named(tmp_path, collator, data, sample, junk):
    for name in ("a", "a.png"):
        corners().save(tmp_path / name, "PNG")
    row = copy.deepcopy(sample)
    *way, last = data.draw(st.sampled_from([*parts_of(row), ("images",), ("tools",), ("more",)]))
    inner = row
    for key in way:
        inner = inner[key]
    inner[last] = junk
    rows = Conversations(str(write(tmp_path / "mine.jsonl", row)), prepare=collator.encode)
    try:
        tensors = rows[0]["tensors"]
    except BrokenSampleError as error:
        assert re.search(r"mine.jsonl, line 1: \w*Error: .* got|must exist", str(error)), error
        assert str(error).isprintable() and len(str(error)) < 900
    else:
        learnt = tensors["labels"] != -100
        assert learnt.any() and not learnt[tensors["mm_token_type_ids"] > 0].any()


def test_a_kind_is_any_name(tmp_path):
    for kind, name in ((0, "0"), (2, "2"), ("time", "time"), (None, "all"), ("", "all")):
        assert Conversations(str(write(tmp_path / "mine.jsonl", GOOD | {"kind": kind})))[0]["kind"] == name


def test_an_image_may_be_named_twice(folder):
    for several in (["a.png"], "a.png", []):
        image, _ = one_image(folder, {"messages": [ASK, SAY], "image": "a.png", "images": several or None})
        assert image.size == corners().size


def test_a_decompression_bomb_breaks_its_own_sample(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write(folder / "mine.jsonl", GOOD | {"image": "a.png"}, GOOD)
    data = Conversations(str(path), "skip")
    assert data[0]["name"].endswith("line 2") and data.rough_length(0) == 0
    with pytest.raises(ValueError, match=r"line 1: .*bomb"):
        Conversations(str(path))[0]


LINES = json.dumps(GOOD).encode()
FILES = {
    "a BOM": (b"\xef\xbb\xbf" + LINES + b"\n" + LINES, [1, 2]),
    "CRLF": (LINES + b"\r\n\r\n" + LINES + b"\r\n", [1, 3]),
    "no last line break": (LINES + b"\n" + LINES, [1, 2]),
    "blank lines": (b"\n \n\t\n" + LINES + b"\n\n" + LINES + b"\n\n", [4, 6]),
    "separators of Unicode": (LINES.replace(b"What", "a\u2028b\x85c".encode()) + b"\n" + LINES, [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "lines"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("streaming", [False, True], ids=["listed", "streamed"])
def test_lines_are_read_alike_listed_and_streamed(tmp_path, content, lines, streaming):
    (tmp_path / "mine.jsonl").write_bytes(content)
    data = Conversations(open_rows(str(tmp_path / "mine.jsonl"), streaming))
    assert [data[i]["name"].rsplit(" ")[-1] for i in (0, 1)] == list(map(str, lines))


@pytest.mark.parametrize("streaming", [False, True], ids=["listed", "streamed"])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "must hold conversations, got none"),
        ("blank.jsonl", b"\n \n", "must hold conversations, got none"),
        ("none.json", b"[]", "must hold conversations, got none"),
        ("wide.jsonl", json.dumps(GOOD).encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("cat.png", b"\x89PNG\r\n", "a picture or a film; name it in the content of a conversation"),
        ("packed.jsonl.gz", b"\x1f\x8b\x08", "gzip; unpack it first"),
        ("packed.zip", b"PK\x03\x04", "zip; unpack it"),
        ("cut.json", b"[" + LINES + b",\n" + LINES[:30], "JSONDecodeError after 1 lines"),
        ("open.json", b"[" + LINES, "ends with ]"),
        ("after.json", b"[" + LINES + b"] x", "ends with ]"),
        ("deep.json", b"[" + b"[" * 100_000, "RecursionError"),
        ("object.json", b'{\n"data": [1]\n}', r"one object with keys \['data'\]"),
        ("broken.parquet", b"PAR1", "must be a data set that can be read"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused_at_the_start(tmp_path, name, content, says, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"open_rows: .*{says}"):
        open_rows(str(tmp_path / name), streaming)


def test_a_name_that_is_no_data_set_is_refused(tmp_path):
    write(tmp_path / "mine.jsonl", GOOD)
    for source in (
        "gone.json",
        "gone.parquet",
        "./gone",
        str(tmp_path / "gone"),
        f"{tmp_path}/mine.jsonl:train",
    ):
        with pytest.raises(ValueError, match=r"open_rows: .*(gone|without a split)"):
            open_rows(source)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("streaming", [False, True], ids=["listed", "streamed"])
def test_an_array_of_json_is_read_row_by_row(folder, indent, streaming):
    good = GOOD | {"note": 'é, ] and "\u4f60": [{'}
    rows = [good, [good], good | {"image": "gone.png"}, good | {"image": "a.png"}]
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    path = folder / "llava.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode().replace(b"\xe4\xbd\xa0", b"\xff", 1))
    data = Conversations(open_rows(str(path), streaming))
    line = 1 + text[: text.index('"image"')].count("\n")
    for index, says in (
        (0, "item 1 .*Unicode"),
        (1, "item 2 .*object"),
        (2, r"item 3 \(line \d+\): FileNotFound"),
    ):
        with pytest.raises(ValueError, match=f"llava.json, {says}"):
            data[index]
    if indent:
        with pytest.raises(ValueError, match=rf"line ({'|'.join(map(str, range(1, line + 1)))})\)"):
            data[2]
    assert data[3]["messages"][0]["content"][0]["image"].size == corners().size


def test_an_array_of_json_may_hold_lines_instead(tmp_path):
    for name in ("lines.json", "lines.txt", "lines"):
        data = Conversations(str(write(tmp_path / name, GOOD, "{", GOOD)))
        assert len(data) == 3 and data[2]["kind"] == "good"
        with pytest.raises(ValueError, match=f"{name}, line 2: JSONDecodeError"):
            data[1]


def hugging_face(folder: Path) -> datasets.Dataset:
    rows = {"messages": [[ASK, SAY]] * 3, "images": [["a.png"]] * 3, "kind": ["0", "1", "2"]}
    return datasets.Dataset.from_dict(rows)


@pytest.mark.parametrize("streaming", [False, True], ids=["listed", "streamed"])
def test_tables_are_named_directly_and_splits_of_folders_by_a_colon(folder, streaming):
    table = hugging_face(folder)
    table.to_parquet(str(folder / "mine.parquet"))
    both = datasets.DatasetDict({"train": table, "check": table.select([2])})
    both.save_to_disk(str(folder / "saved"))
    (folder / "files").mkdir()
    table.to_parquet(str(folder / "files" / "train.parquet"))
    table.select([1]).to_parquet(str(folder / "files" / "test.parquet"))
    arrow = next((folder / "saved" / "train").glob("*.arrow"))
    for source, kind in (
        ("mine.parquet", "0"), (arrow.relative_to(folder), "0"), ("saved", "0"), ("saved:check", "2"),
        ("saved:train", "0"), ("files", "0"), ("files:test", "1"), ("saved/check", "2"),
    ):  # fmt: skip
        rows = open_rows(str(folder / source), streaming)
        assert rows.row(0)["kind"] == kind and rows.name(0).endswith("row 0"), source
    image = Conversations(open_rows(str(folder / "mine.parquet"), streaming))[0]["messages"][0]["content"][0]
    assert image["image"].size == corners().size  # relative to the file
    for source, says in (
        ("saved:gone", "check.*train"),
        ("files:gone", "gone"),
        ("mine.parquet:train", "split"),
    ):
        with pytest.raises(ValueError, match=f"open_rows: .*{says}"):
            open_rows(str(folder / source), streaming)


def test_weights_are_finite_and_above_zero(tmp_path):
    assert parse_weight("a.jsonl") == ("a.jsonl", 1.0) and parse_weight("o/n:train@2.5") == ("o/n:train", 2.5)
    (tmp_path / "a@0.jsonl").touch()
    (tmp_path / "b@c").mkdir()
    assert parse_weight(f"{tmp_path}/a@0.jsonl") == (f"{tmp_path}/a@0.jsonl", 1.0)
    assert parse_weight(f"{tmp_path}/a@0.jsonl@3") == (f"{tmp_path}/a@0.jsonl", 3.0)
    assert parse_weight(f"{tmp_path}/b@c/d.jsonl") == (f"{tmp_path}/b@c/d.jsonl", 1.0)
    for weight in ("0", "-1", "nan", "inf", "-inf", "1e999", "x", ""):
        with pytest.raises(RefusedError, match="a weight in --data must be a finite number > 0, got "):
            parse_weight(f"a.jsonl@{weight}")


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_mixture_refuses_such_weights_wherever_they_stand(weight):
    for weights in ((1.0, weight), (weight, 1.0)):
        with pytest.raises(ValueError, match="Mixture: weights must be finite numbers > 0"):
            Mixture([range(3), range(3)], weights, seed=0)


def test_a_run_refuses_bad_weights_and_names(folder, collator):
    write(folder / "a.jsonl", *[GOOD] * 3)
    for data in ("a.jsonl@0", "a.jsonl@nan", "gone.jsonl", "a.jsonl:train"):
        config = parse(["--teacher", str(TEACHER), "--data", str(folder / data)])
        with pytest.raises(RefusedError):
            open_data(config, collator, folder / "report.jsonl", 1)


def test_holding_out_takes_time_in_proportion(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text(
        '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n' * 60_000
    )
    data = Conversations(str(path))
    started = time.perf_counter()
    rest, held_out = data.split(20)
    assert time.perf_counter() - started < 2  # 5 s where it is quadratic
    assert (len(rest), len(held_out)) == (57_000, 3_000)
    assert sorted([*rest.lines, *held_out.lines]) == list(range(60_000)) and list(held_out.lines[:2]) == [
        0,
        20,
    ]


def without_pyav(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert importlib.util.find_spec("av") is None


@pytest.mark.parametrize("on_broken", ["refuse", "skip"])
def test_films_without_pyav_are_one_refusal_at_the_start(folder, on_broken, monkeypatch):
    shades(3)[0].save(folder / "film.gif", save_all=True, append_images=shades(4)[1:])
    film = GOOD | {"video": "film.mp4"}
    others = [GOOD, GOOD | {"video": "film.gif"}, GOOD | {"video": ["a.png"] * 2}, "{"]
    path, without = write(folder / "mine.jsonl", *others, film), write(folder / "others.jsonl", *others)
    table = datasets.Dataset.from_dict({"messages": [[ASK, SAY]], "videos": [["film.mp4"]]})
    table.to_parquet(str(folder / "mine.parquet"))
    without_pyav(monkeypatch)
    with pytest.raises(
        MissingPackageError, match=r"mine.jsonl, line 5: PyAV must be installed.*pip install av"
    ):
        Conversations(str(path), on_broken)
    with pytest.raises(MissingPackageError, match=r"mine.parquet, row 0: PyAV"):
        Conversations(str(folder / "mine.parquet"), on_broken)
    stream = Conversations(open_rows(str(path), streaming=True), "skip")
    with pytest.raises(MissingPackageError, match="PyAV must be installed"):
        stream[4]
    data = Conversations(str(without), "skip")
    assert [len(data[i]["messages"][0]["content"][0].get("video", [])) for i in range(3)] == [0, 4, 2]


def endless_trouble() -> Iterator[dict]:
    """Two rows, and the connection is gone."""
    yield GOOD | {"_number": 0}
    yield GOOD | {"_number": 1}
    raise ConnectionError("no route to host")


@pytest.mark.parametrize("on_broken", ["refuse", "skip"])
def test_a_stream_that_breaks_off_ends_the_run_by_name(on_broken):
    rows = Stream("OWNER/NAME", datasets.IterableDataset.from_generator(endless_trouble), Path())
    data = Conversations(rows, on_broken)
    assert data[1]["name"] == "OWNER/NAME, row 1"
    for _ in range(2):
        with pytest.raises(
            StreamEndedError, match=r"OWNER/NAME must be readable on, got Conn.* after 2 rows"
        ):
            data[2]


def test_every_control_token_is_refused_wherever_it_stands(collator):
    tokens = control_tokens(collator.processor)
    for needed in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>"):
        assert needed in tokens
    for token in tokens:
        for messages in (
            [{"role": "system", "content": f"a{token}"}, ASK, SAY],
            [ASK | {"content": token}, SAY],
            [ASK | {"content": [{"type": "text", "text": f"a {token} b"}]}, SAY],
            [ASK, SAY | {"content": f"{token}7"}],
        ):
            for use in (collator, collator.with_names):
                with pytest.raises(
                    ValueError, match="no placeholder or other control token of the model, got"
                ):
                    use([{"messages": messages}])
    for text in ("<im_end>", "im_start", "a < b | c > d", "<image_pad>", *GROUNDING):
        collator([{"messages": [ASK | {"content": text}, SAY]}])


@pytest.mark.parametrize("supervise", ["answers", "all"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_vision_tokens_of_an_answer_are_never_supervised(collator, supervise, kind):
    source = corners() if kind == "image" else shades(4)
    shown = {"type": kind, kind: source}
    for blocks in ([shown, {"type": "text", "text": "7"}], [{"type": "text", "text": "7"}, shown]):
        messages = [ASK, {"role": "assistant", "content": blocks}]
        item = {"kind": "all", "messages": messages}
        learner = ChatCollator(collator.processor, supervise=supervise)
        for batch in (learner([item]), learner([learner.encode(item)])):
            learnt = batch["labels"] != -100
            assert (batch["mm_token_type_ids"] > 0).sum() >= WIDTH // 8 and not learnt[
                batch["mm_token_type_ids"] > 0
            ].any()
            if supervise == "answers":
                assert collator.processor.tokenizer.decode(batch["labels"][learnt]) == "7<|im_end|>"


def test_pictures_that_a_processor_or_template_drops_are_refused(monkeypatch):
    processor = load_processor(str(TEACHER), padding_side="right")
    image = {"messages": asked({"type": "image", "image": corners()}, TEXT)}
    video = {"messages": asked({"type": "video", "video": shades(8)}, TEXT)}
    whole = processor.chat_template
    for item, kind in ((image, "image"), (video, "video")):
        assert ChatCollator(processor)([item])[f"{kind}_grid_thw"].shape == (1, 3)
        processor.chat_template = whole.replace(f"<|{kind}_pad|>", "")
        with pytest.raises(
            ValueError, match=rf"every {kind} must be in the batch|should be the same as the number"
        ):
            ChatCollator(processor)([item])
        processor.chat_template = whole
    part = processor.video_processor
    stock = type(part).__call__
    monkeypatch.setattr(
        type(part),
        "__call__",
        lambda self, videos, **more: stock(self, [[v[::2] for v in videos[0]]], **more),
    )
    with pytest.raises(
        ValueError, match=r"every video must be in the batch with all its frames, \[4\] moments, got \[2\]"
    ):
        ChatCollator(processor)([video])
