"""Ask a teacher or a student about a picture.

    python -m linmu.reference.demo.ask FOLDER IMAGE "Which digit is right of the 7?"

Several images are the frames of a video. A folder written by distill.py is a student and opens as one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from ..prompts.chat_collator import ChatCollator
from ..prompts.processors import load_processor
from ..training.data.media import Media
from .flags import without_traceback
from .questions import FRAMES_PER_SECOND


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    frames: Sequence[Image.Image | str | Path],
    question: str,
    *,
    fps: float = FRAMES_PER_SECOND,
    max_new_tokens: int = 32,
) -> str:
    """Return the model's answer, decoded greedily.

    Args:
        frames: one picture or its path, or the frames of a video in order; turned upright as in training.
        fps: frames per second of a video.
    Raises:
        ValueError: without frames, if one cannot be decoded, if their sizes differ, or for an fps that is no
            finite number > 0.
        FileNotFoundError: for a path that is not there.
    """
    if not frames:
        raise ValueError("ask: frames must be at least one, of one size, got none")
    media = Media(Path())
    if len(frames) == 1:
        block = {"type": "image", "image": media.image(frames[0])}
    else:
        block = {"type": "video"} | media.video(list(frames), fps)
    messages = [{"role": "user", "content": [{"type": "text", "text": question}, block]}]
    batch = ChatCollator(processor, supervise="nothing")([{"messages": messages}])
    batch = {key: value.to(model.device) for key, value in batch.items()}
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Read the command line and print the answer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="teacher or student, folder or Hub id")
    parser.add_argument("images", nargs="+", help="one image, or the frames of a video in order")
    parser.add_argument("question")
    parser.add_argument("--fps", type=float, default=FRAMES_PER_SECOND, help="frames per second of a video")
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.folder).eval()
    print(ask(model, load_processor(options.folder), options.images, options.question, fps=options.fps))


if __name__ == "__main__":
    with without_traceback():
        main()
