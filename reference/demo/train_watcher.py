"""Teach a student of the bundled teacher to watch: films of several scenes, with their answers.

    python -m linmu.reference.demo.train_watcher STUDENT OUTPUT

The bundled teacher was trained on one picture a prompt, and of a second scene it answers half wrongly itself.
So here the answers are what is learnt from, not the teacher: cross-entropy, after distillation.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import islice

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin, set_seed

from ..prompts.answers import TURN_END
from ..prompts.chat_collator import IGNORED, ChatCollator
from ..prompts.processors import load_processor
from .film import digits_film
from .flags import at_least
from .questions import FRAMES_PER_SECOND, conversation

WARMUP = 30  # steps
TOLD = 50  # steps between two lines


def teach(
    student: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    steps: int,
    films: int = 4,
    scenes: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train the decoder layers on films of digits, in place.

    Choice: embeddings and vision tower stay the teacher's, since what a scene shows has not changed.

    Args:
        student: of the bundled teacher.
        processor: its processor.
        steps: of the optimiser.
        films: in a batch, each of other scenes.
        scenes: of a film, one conversation: each is asked about, shown and answered.
        learning_rate: after the warm-up; it falls to 0 as a cosine.
        seed: of the films.
    Returns:
        the share of tokens of answers that were the likeliest, a number for every step.
    """
    student.requires_grad_(False)
    layers = student.get_decoder().layers.requires_grad_(True)
    optimizer = torch.optim.AdamW(layers.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    end = processor.tokenizer.convert_tokens_to_ids(TURN_END)
    collate, film, right = ChatCollator(processor), digits_film("train", seed), []
    for step in range(steps):
        rate = learning_rate * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        items = [{"kind": "film", "messages": film_conversation(islice(film, scenes))} for _ in range(films)]
        batch = {name: tensor.to(student.device) for name, tensor in collate(items).items()}
        output = student(**batch, use_cache=False)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        labels = batch["labels"][:, 1:]
        answers = (labels != IGNORED) & (labels != end)
        right.append((output.logits[:, :-1].argmax(-1) == labels)[answers].float().mean().item())
        if (step + 1) % TOLD == 0:
            mean = sum(right[-TOLD:]) / TOLD
            print(f"step {step + 1} of {steps}: {mean:.3f} right", file=sys.stderr, flush=True)
    return right


def film_conversation(scenes) -> list[dict]:
    """Return the turns of a film: of every scene its question and frames, and its answer."""
    turns = []
    for scene in scenes:
        block = {"type": "video", "video": scene.frames, "fps": FRAMES_PER_SECOND}
        turns += conversation(block, scene.question, scene.answer)
    return turns


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student", help="folder of a student of the bundled teacher")
    parser.add_argument("output", help="folder for the student that watches")
    parser.add_argument("--steps", type=at_least(1), default=900, help="of the optimiser")
    parser.add_argument("--films", type=at_least(1), default=4, help="in a batch")
    parser.add_argument("--scenes", type=at_least(1), default=8, help="of a film")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="after the warm-up")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the films")
    options = vars(parser.parse_args(arguments))
    folder, output = options.pop("student"), options.pop("output")
    set_seed(options["seed"])
    student, processor = AutoModelForImageTextToText.from_pretrained(folder), load_processor(folder)
    teach(student.train(), processor, **options)
    student.eval().save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main()
