"""Every family's processor gets all pictures and all frames, or says that it cannot; none is lost in silence.

Without torchvision (on most machines that run this) videos must be refused; with it, kept whole.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from linmu.reference.prompts.chat_collator import ChatCollator
from linmu.reference.prompts.other_processors import (
    LinMUInternVLProcessor,
    LinMULlavaOnevisionProcessor,
    LinMUQwen3VLProcessor,
)

from ..training.video_parts import video_part
from .tiny_families import BUILDERS, byte_tokenizer

pytestmark = pytest.mark.trial_of_the_reference

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for b in m.content %}{% if b.type == 'text' %}{{ b.text }}"
    "{% elif b.type == 'image' %}IMAGE{% else %}VIDEO{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
TURNS = ("<|im_start|>", "<|im_end|>")
QWEN_SHOWN = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")


def qwen3_vl():
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    pixels = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    part = video_part("Qwen3VL")
    if part:
        part["video_processor"].__dict__.update(
            patch_size=4, size={"shortest_edge": 64, "longest_edge": 65536}
        )
    return LinMUQwen3VLProcessor(pixels, byte_tokenizer((*TURNS, *special)), **part), QWEN_SHOWN


def llava_onevision():
    pinpoints = [[12 * y, 12 * x] for y in (1, 2) for x in (1, 2)]
    pixels = LlavaOnevisionImageProcessorPil(size={"height": 12, "width": 12}, image_grid_pinpoints=pinpoints)
    tokenizer = byte_tokenizer(TURNS, {"image_token": "<image>", "video_token": "<video>"})
    settings = {"num_image_tokens": 9, "vision_feature_select_strategy": "full"}
    return LinMULlavaOnevisionProcessor(pixels, tokenizer, **settings, **video_part("LlavaOnevision")), (
        "<image>\n", "<video>\n",
    )  # fmt: skip


def internvl():
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokenizer = byte_tokenizer(TURNS, named | {"video_token": "<video>"})
    pixels = GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, crop_to_patches=False)
    processor = LinMUInternVLProcessor(pixels, tokenizer, image_seq_length=9, **video_part("InternVL"))
    return processor, ("<IMG_CONTEXT>\n", "<video>\n")


FAMILIES = {made.__name__: made for made in (qwen3_vl, llava_onevision, internvl)}
NOISE = np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3), dtype=np.uint8)
PICTURE = {"type": "image", "image": Image.fromarray(NOISE[0])}
FILM = {"type": "video", "video": [Image.fromarray(frame) for frame in NOISE], "fps": 2.0}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "7"}]}


def collator_of(family: str) -> ChatCollator:
    processor, (image, video) = FAMILIES[family]()
    processor.chat_template = CHATML.replace("IMAGE", image).replace("VIDEO", video)
    processor.tokenizer.padding_side = "right"
    return ChatCollator(processor)


def shown(*blocks: dict) -> dict:
    return {
        "kind": "all",
        "messages": [{"role": "user", "content": [*blocks, {"type": "text", "text": "?"}]}, ANSWER],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_all_there_and_answers_alone_are_learnt(family):
    collator = collator_of(family)
    one, two = (collator([shown(*[PICTURE] * count)]) for count in (1, 2))
    assert len(two["pixel_values"]) == 2 * len(one["pixel_values"])
    in_answer = [
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        ANSWER | {"content": [PICTURE, *ANSWER["content"]]},
    ]
    for batch in (one, two, collator([{"messages": in_answer}])):
        labels = batch["labels"][batch["labels"] != -100]
        assert collator.processor.tokenizer.decode(labels).strip() == "7<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_frame_of_a_video_is_there_or_the_video_is_refused(family):
    collator = collator_of(family)
    item = shown(FILM)
    if not is_torchvision_available():
        with pytest.raises(ValueError, match=r"videos must come with torchvision.*pip install torchvision"):
            collator([item])
        return
    batch = collator([item])
    if family == "qwen3_vl":
        assert batch["video_grid_thw"].tolist() == [[8, 6, 6]]
    else:
        pixels = batch["pixel_values_videos" if family == "llava_onevision" else "pixel_values"]
        assert pixels.numel() == 16 * 3 * pixels.shape[-1] ** 2


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "internvl", "idefics3", "smolvlm"])
@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the stock processors take videos")
def test_a_processor_without_its_video_part_refuses_videos(family):
    processor = BUILDERS[family]().processor
    for videos in ([NOISE], [[NOISE]]):
        with pytest.raises(ValueError, match=r"Processor: videos must come with torchvision"):
            processor(text=["see"], videos=videos)
    assert "input_ids" in processor(text=["see"])
