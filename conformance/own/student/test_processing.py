"""The processor on trial: patches against loops over pixels, batches against rows, labels against answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from linmu.reference.demo import TEACHER, DigitsQuestions
from linmu.reference.prompts import processors
from linmu.reference.prompts.chat_collator import ChatCollator
from linmu.reference.prompts.processors import load_processor
from linmu.reference.prompts.qwen_processing import FrameProcessor, LinMUQwen2_5_VLProcessor

pytestmark = pytest.mark.trial_of_the_reference

IMAGE_KINDS, VIDEO_KINDS = ("cell", "read", "count"), ("moved", "moment", "changed")
# with torchvision the stock classes, video part and all, are what `load_processor` opens
OPENED = processors.STOCK_PROCESSORS if is_torchvision_available() else processors.PROCESSORS


@pytest.fixture(scope="module")
def processor():
    return LinMUQwen2_5_VLProcessor.from_pretrained(TEACHER)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def patch_rows_by_loops(frames, patch, depth, merge, mean, std):
    """List the patches token by token, pixel group by pixel group."""
    frames = list(frames)
    while len(frames) % depth:
        frames.append(frames[-1])
    height, width = frames[0].shape[:2]
    rows = []
    for t in range(0, len(frames), depth):
        for token_y in range(0, height, patch * merge):
            for token_x in range(0, width, patch * merge):
                for y in range(token_y, token_y + patch * merge, patch):
                    for x in range(token_x, token_x + patch * merge, patch):
                        cut = [f[y : y + patch, x : x + patch] for f in frames[t : t + depth]]
                        row = [(c[..., k] / 255 - mean[k]) / std[k] for k in range(3) for c in cut]
                        rows.append(np.stack(row).reshape(-1))
    return np.stack(rows)


@given(
    seed=st.integers(0, 999),
    frames=st.integers(1, 5),
    patch=st.integers(1, 4),
    depth=st.integers(1, 3),
    merge=st.integers(1, 3),
    tokens=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_frames_become_the_patches_that_loops_over_pixels_cut(seed, frames, patch, depth, merge, tokens):
    side = patch * merge
    video = noise(seed, frames, tokens[0] * side, tokens[1] * side, 3)
    settings = dict(patch_size=patch, temporal_patch_size=depth, merge_size=merge, do_resize=False)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.4, 0.3]
    out = FrameProcessor(**settings, image_mean=mean, image_std=std)([video])
    moments = -(-frames // depth)
    assert out["video_grid_thw"].tolist() == [[moments, tokens[0] * merge, tokens[1] * merge]]
    want = patch_rows_by_loops(video, patch, depth, merge, mean, std)
    np.testing.assert_allclose(out["pixel_values_videos"].numpy(), want, rtol=0, atol=5e-6)


@given(seed=st.integers(0, 999), height=st.integers(5, 90), width=st.integers(5, 90))
def test_a_picture_is_a_video_of_two_equal_frames(seed, height, width):
    """The stock image processor is the second formulation.

    Where it resizes, it rounds to grey levels elsewhere than the stock video processor does: one level in
    the root mean square is allowed.
    """
    stock = Qwen2VLImageProcessorPil.from_pretrained(TEACHER)
    frames = FrameProcessor(**{**stock.to_dict(), "size": dict(stock.size)})
    picture = np.kron(noise(seed, -(-height // 4), -(-width // 4), 3), np.ones((4, 4, 1), np.uint8))
    picture = picture[:height, :width]
    image = stock([Image.fromarray(picture)], return_tensors="pt")
    video = frames([np.stack([picture, picture])])
    assert torch.equal(image["image_grid_thw"], video["video_grid_thw"])
    levels = (image["pixel_values"] - video["pixel_values_videos"]) * (max(stock.image_std) * 255)
    if height % 8 == 0 and width % 8 == 0:
        assert levels.abs().max() < 1e-3
    assert levels.square().mean().sqrt() < 1.0


def test_pil_frames_arrays_and_nesting_are_the_same_video():
    video = noise(0, 4, 16, 24, 3)
    frames = FrameProcessor(patch_size=4, min_pixels=64)
    want = frames([video])["pixel_values_videos"]
    for form in ([[Image.fromarray(f) for f in video]], [[video]], [list(video)], [torch.from_numpy(video)]):
        assert torch.equal(frames(form)["pixel_values_videos"], want)


def mixed_items() -> list[dict]:
    pictures = DigitsQuestions(kinds=IMAGE_KINDS).__getitems__(range(3))
    videos = DigitsQuestions(kinds=VIDEO_KINDS).__getitems__(range(3))
    text = {"messages": [{"role": "user", "content": "Read row 2."}, {"role": "assistant", "content": "7"}]}
    both = {
        "messages": [
            {"role": "user", "content": [p["messages"][0]["content"][1] for p in (videos[0], pictures[0])]},
            {"role": "assistant", "content": [{"type": "text", "text": "12"}]},
            {"role": "user", "content": [pictures[1]["messages"][0]["content"][1]]},
            {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
        ]
    }
    return [pictures[0], videos[0], text, pictures[1], both, videos[1], pictures[2], videos[2]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("supervise", ["answers", "nothing"])
def test_a_mixed_batch_holds_what_its_rows_hold_alone(side, supervise):
    processor = load_processor(TEACHER, padding_side=side)
    collate = ChatCollator(processor, supervise=supervise)
    items = mixed_items()
    batch, alone = collate(items), [collate([item]) for item in items]
    for row, single in enumerate(alone):
        real = batch["attention_mask"][row].bool()
        assert bool(real[0 if side == "right" else -1])
        for key in ("input_ids", "mm_token_type_ids", *(["labels"] if supervise == "answers" else [])):
            assert batch[key][row][real].tolist() == single[key][0].tolist(), (row, key)
    shared = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    for key in shared:
        assert torch.equal(batch[key], torch.cat([single[key] for single in alone if key in single])), key
    kinds = batch["mm_token_type_ids"]
    tokens = batch["image_grid_thw"].prod(1).sum() // 4, batch["video_grid_thw"].prod(1).sum() // 4
    assert ((kinds == 1).sum(), (kinds == 2).sum()) == tokens


@given(rows=st.lists(st.integers(0, 9999), min_size=1, max_size=6))
def test_labels_are_the_answers_and_their_ends(processor, rows):
    items = DigitsQuestions().__getitems__(rows) + mixed_items()[2:5:2]
    batch = ChatCollator(processor)(items)
    for ids, labels, item in zip(batch["input_ids"], batch["labels"], items, strict=True):
        kept = labels != -100
        assert torch.equal(labels[kept], ids[kept])
        said = [turn["content"] for turn in item["messages"] if turn["role"] == "assistant"]
        said = [text if isinstance(text, str) else text[0]["text"] for text in said]
        assert processor.tokenizer.decode(labels[kept]) == "".join(f"{text}<|im_end|>" for text in said)


def test_prompts_end_where_an_answer_begins(processor):
    items = DigitsQuestions().__getitems__(range(5))
    prompts = ChatCollator(processor, supervise="nothing")(items)
    whole = ChatCollator(processor)(items)
    for row in range(5):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row] > 0].tolist()
        text = whole["input_ids"][row][whole["attention_mask"][row] > 0].tolist()
        answer = whole["labels"][row][whole["labels"][row] != -100].tolist()
        assert text[: len(prompt) + len(answer)] == prompt + answer


def test_frames_per_second_become_seconds_per_moment(processor):
    block = {"type": "video", "video": noise(0, 4, 16, 16, 3)}
    messages = [{"role": "user", "content": [block, block | {"fps": 0.5}]}]
    batch = ChatCollator(processor, supervise="nothing")([{"messages": messages}])
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([2 / 24, 4.0])


def test_saving_and_loading_changes_nothing(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    shutil.copy(TEACHER / "config.json", tmp_path)
    items = mixed_items()
    want = ChatCollator(processor)(items)
    for again in (load_processor(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) in (OPENED["qwen2_5_vl"], LinMUQwen2_5_VLProcessor)
        got = ChatCollator(again)(items)
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_a_qwen2_vl_folder_gets_its_own_family(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TEACHER / name, tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        text = (TEACHER / name).read_text().replace("Qwen2_5_VLProcessor", "Qwen2VLProcessor")
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    family = load_processor(tmp_path)
    assert type(family) is OPENED["qwen2_vl"]
    batch = ChatCollator(family)(mixed_items())
    assert "second_per_grid_ts" not in batch and "pixel_values_videos" in batch


def test_with_torchvision_the_stock_classes_are_asked(monkeypatch):
    asked = []

    class Stock:
        @classmethod
        def from_pretrained(cls, folder):
            asked.append(Path(folder))
            return ProcessorMixin.__new__(ProcessorMixin)

    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(processors, "STOCK_PROCESSORS", {"qwen2_5_vl": Stock})
    load_processor(TEACHER)
    assert asked == [TEACHER]


@pytest.mark.parametrize(
    ("settings", "video", "says"),
    [
        (dict(do_resize=False, patch_size=4), noise(0, 2, 12, 16, 3), "multiples of 8 pixels, got 12 x 16"),
        (dict(), noise(0, 2, 16, 16, 3).astype(np.float32), "must be uint8"),
        (dict(), noise(0, 2, 3, 16, 16), "must be uint8 of shape"),
        (dict(do_sample_frames=True), noise(0, 2, 16, 16, 3), "do_sample_frames must be False"),
        (dict(resample=2), noise(0, 2, 17, 16, 3), "resample must be 3"),
        (dict(), "film.mp4", "frames in memory, got str"),
    ],
)
def test_what_frames_cannot_be_says_why(settings, video, says):
    with pytest.raises(ValueError, match=says):
        FrameProcessor(**settings)([video])


def test_other_mistakes_say_why(processor):
    with pytest.raises(ValueError, match=r"settings must be among .* got \['fps'\]"):
        FrameProcessor()([noise(0, 2, 16, 16, 3)], fps=3)
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'up'"):
        load_processor(TEACHER, padding_side="up")
    processor = load_processor(TEACHER)
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match="must close an answer with a control token"):
        ChatCollator(processor)(DigitsQuestions().__getitems__([0]))
