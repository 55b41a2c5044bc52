"""Prompts of text, images and videos at random, as vLLM takes them and as generate() does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGE, VIDEO = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
KINDS = ("text", "image", "two images", "video", "image and video")


@dataclass
class Request:
    """A prompt with its pictures.

    Args:
        kind: one of KINDS.
        prompt: the text, a placeholder for each picture.
        images: in the order of the prompt.
        videos: arrays (frames, height, width, 3) uint8 at two frames a second.
        tokens: how many to generate.
    """

    kind: str
    prompt: str
    images: list[Image.Image]
    videos: list[np.ndarray]
    tokens: int

    def for_vllm(self) -> dict[str, Any]:
        """Return what `LLM.generate` takes."""
        data: dict[str, Any] = {"image": self.images} if self.images else {}
        if self.videos:
            whole = {"do_sample_frames": False}
            data["video"] = [(video, metadata_of(video) | whole) for video in self.videos]
        return {"prompt": self.prompt} | ({"multi_modal_data": data} if data else {})

    def for_generate(self, processor) -> dict[str, torch.Tensor]:
        """Return what the student's generate() takes."""
        if not self.images and not self.videos:
            tokenizer = getattr(processor, "tokenizer", processor)
            return dict(tokenizer(self.prompt, return_tensors="pt", return_token_type_ids=False))
        given = {"images": [self.images]} if self.images else {}
        if self.videos:
            metadata = [metadata_of(video) for video in self.videos]
            given |= {"videos": [list(self.videos)], "video_metadata": metadata, "do_sample_frames": False}
        return dict(processor(text=[self.prompt], return_tensors="pt", **given))


def metadata_of(video: np.ndarray) -> dict[str, Any]:
    """Return what a video file would say of itself."""
    frames = len(video)
    return {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
    }


def request_at_random(seed: int, kinds: tuple[str, ...] = KINDS) -> Request:
    """Return one that depends on the seed alone; its pictures are noise on grids of 2 to 5 tokens a side."""
    draw = np.random.default_rng(seed)

    def words(least: int) -> str:
        letters = draw.integers(ord("a"), ord("z") + 1, draw.integers(least, 24))
        return "".join(map(chr, letters))

    def picture(*frames: int) -> np.ndarray:
        height, width = 8 * draw.integers(2, 6, 2)
        return draw.integers(0, 256, (*frames, height, width, 3), dtype=np.uint8)

    kind = kinds[seed % len(kinds)]
    images = [Image.fromarray(picture()) for _ in range({"two images": 2}.get(kind, int("image" in kind)))]
    videos = [picture(2 * int(draw.integers(1, 7)))] if "video" in kind else []
    places = [IMAGE] * len(images) + [VIDEO] * len(videos)
    prompt = words(1) + "".join(place + words(0) for place in places) + words(1)
    return Request(kind, prompt, images, videos, int(draw.integers(1, 13)))
