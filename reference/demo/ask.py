"""Ask a teacher or a student about a picture.

    python -m linmu.reference.demo.ask FOLDER IMAGE "Which digit is right of the 7?"

Several images are the frames of a video. A folder written by distill.py is a student and opens as one.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from ..prompts.chat_collator import ChatCollator
from ..prompts.processors import load_processor
from .questions import FRAMES_PER_SECOND


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    frames: list[Image.Image],
    question: str,
    *,
    fps: float = FRAMES_PER_SECOND,
    max_new_tokens: int = 32,
) -> str:
    """Return the model's answer, decoded greedily.

    Args:
        frames: one picture, or the frames of a video, all of one size.
        fps: frames per second of a video.
    Raises:
        ValueError: without frames, or if their sizes differ.
    """
    if not frames or len({frame.size for frame in frames}) > 1:
        raise ValueError(
            f"ask: frames must be at least one, of one size, got sizes {[f.size for f in frames]}"
        )
    pictures = [frame.convert("RGB") for frame in frames]
    block = (
        {"type": "image", "image": pictures[0]}
        if len(pictures) == 1
        else {"type": "video", "video": pictures, "fps": fps}
    )
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
    frames = [Image.open(path) for path in options.images]
    print(ask(model, load_processor(options.folder), frames, options.question, fps=options.fps))


if __name__ == "__main__":
    main()
