"""Other families than the bundled teacher's, from their folder to a measured student."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from linmu.reference import convert
from linmu.reference.demo import TEACHER
from linmu.reference.prompts.chat_collator import ChatCollator, of_one_size
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.commands.main import main
from linmu.reference.training.refusal import RefusedError

from ..student import tiny_families
from ..student.tiny_families import BUILDERS, byte_tokenizer
from .chat_templates import OF_PICTURES
from .own_data import flags

pytestmark = pytest.mark.trial_of_the_reference

FAMILIES = [name for name in OF_PICTURES if name != "qwen2_5_vl"]
WITH_VIDEOS = {"qwen2_vl"}
if is_torchvision_available():
    WITH_VIDEOS |= {"qwen3_vl", "qwen3_vl_moe", "llava_onevision", "internvl"}
SIZES = ((16, 32), (40, 16), (24, 24))


@pytest.fixture
def chatty(monkeypatch):
    """Builds a family's tiny teacher with its published chat template, in a folder."""

    def build(family: str, folder: Path) -> Path:
        written = OF_PICTURES[family]
        monkeypatch.setattr(tiny_families, "byte_tokenizer", lambda special, named=None: byte_tokenizer(
            (*written.special, *special), named))  # fmt: skip
        tiny = BUILDERS[family]()
        tiny.processor.chat_template = written.template
        if family in WITH_VIDEOS:
            edges = {"shortest_edge": 64, "longest_edge": 65536}
            size = edges if family.startswith("qwen") else tiny.processor.image_processor.size
            tiny.processor.video_processor.__dict__.update(patch_size=4, size=size)
        tiny.teacher.save_pretrained(folder)
        tiny.processor.save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def data(tmp_path) -> Path:
    """Conversations with no picture, or one, or two of several sizes."""
    for number, (height, width) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    rows = []
    for number in range(30):
        pictures = [{"type": "image", "image": f"{(number + i) % 3}.png"} for i in range(number % 3)]
        asked = {"role": "user", "content": [*pictures, {"type": "text", "text": "how"}]}
        rows.append({"messages": [asked, {"role": "assistant", "content": "1"}]})
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def with_videos(data: Path) -> None:
    """Put a video beside what every fourth question shows."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number, row in enumerate(rows[::4]):
        video = {"type": "video", "video": [f"{number % 3}.png"] * 4, "fps": 2.0}
        row["messages"][0]["content"].insert(0, video)
    data.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_checked_distilled_and_measured(family, chatty, data, tmp_path, capsys):
    """By its own chat template: text, one picture, several, and videos where its processor takes them."""
    teacher = str(chatty(family, tmp_path / "teacher"))
    if family in WITH_VIDEOS:
        with_videos(data)
    arguments = flags(data, tmp_path / "run")
    arguments[arguments.index(str(TEACHER))] = teacher
    arguments += ["--tune", "full"] if family == "qwen3_vl_moe" else []
    main([*arguments, "--dry_run"])
    said = capsys.readouterr().out
    assert "vision     0 to " in said and "vision     0 to 0" not in said
    rows = main(arguments)["rows"]
    measured = main(["evaluate", str(tmp_path / "run" / "student"), "--data", str(data), "--cpu", "--teacher",
                     teacher, "--batch_size", "7"])  # fmt: skip
    assert rows["stage iii"]["kl"] > 0 and measured["student"]["kl"] > 0 == measured["teacher"]["kl"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_samples_encoded_one_by_one_are_the_batch_that_the_processor_makes(
    family, side, chatty, data, tmp_path
):
    processor = load_processor(str(chatty(family, tmp_path / "teacher")), padding_side=side)
    collator = ChatCollator(processor)
    items = []
    for line in data.read_text().splitlines()[:6]:
        messages = json.loads(line)["messages"]
        for block in messages[0]["content"]:
            if block["type"] == "image":
                block["image"] = Image.open(data.parent / block["image"])
        messages[1]["content"] = [{"type": "text", "text": "1"}]
        items.append({"kind": "all", "messages": messages})
    at_once = collator(items)
    one_by_one = collator([collator.encode(item) for item in items])
    assert at_once.keys() == one_by_one.keys()
    for name, tensor in at_once.items():
        assert torch.equal(filled(name, tensor), filled(name, one_by_one[name])), name


def filled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What a model makes of it: rows without a picture, which Idefics3's fills with tiles of 0, count for
    nothing."""
    tensor = torch.as_tensor(tensor)
    if name == "batch_num_images":
        return tensor[tensor > 0]
    if name in ("pixel_values", "pixel_attention_mask"):
        tiles = tensor.flatten(0, 1) if tensor.ndim == 5 or name == "pixel_attention_mask" else tensor
        return tiles[tiles.flatten(1).any(1)]
    return tensor


def test_videos_of_several_lengths_are_not_filled_up():
    short, long = torch.ones(1, 2, 3, 4, 4), torch.ones(1, 5, 3, 4, 4)
    assert of_one_size("pixel_values", [short, long])[0][0, 2:].abs().sum() == 0
    with pytest.raises(
        ValueError, match=r"pixel_values_videos of a batch must be of one size.*\(2, 3, 4, 4\)"
    ):
        of_one_size("pixel_values_videos", [short, long])


def test_a_teacher_of_another_vocabulary_is_no_measure(data, tmp_path):
    teacher = AutoModelForImageTextToText.from_pretrained(TEACHER)
    for name, model in (("student", convert(teacher)), ("teacher", teacher)):
        if name == "teacher":
            model.resize_token_embeddings(model.config.get_text_config().vocab_size + 61)
        model.save_pretrained(tmp_path / name)
        load_processor(str(TEACHER)).save_pretrained(tmp_path / name)
    with pytest.raises(RefusedError, match=r"--teacher must have as many tokens as the student, got .*453"):
        main(["evaluate", str(tmp_path / "student"), "--data", str(data), "--cpu", "--teacher",
              str(tmp_path / "teacher")])  # fmt: skip
