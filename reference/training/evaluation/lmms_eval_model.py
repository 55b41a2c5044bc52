"""Teachers and students as a model of lmms-eval, which knows it as `linmu` where both are installed:

    lmms-eval --model linmu --model_args pretrained=FOLDER --tasks textvqa_val,mmmu_val

Both kinds get the same tensors, those that `distill.py` makes of a conversation; so two runs differ in the
model alone. `commands/benchmark.py` does both and prints one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import Collator
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ...checks import require
from ...prompts.chat_collator import ChatCollator
from ...prompts.processors import load_processor
from ...student.convert import load
from ..data.media import Media

WHERE = "lmms-eval's model linmu"
NOT_STOPS = ("\n\n",)  # what lmms-eval fills in where a task names no stop; its Qwen models pass it over, too
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class LinMU(lmms):
    """A teacher or a student that answers what lmms-eval asks.

    Args:
        pretrained: folder or Hub id of either.
        backend: who computes a student, "optimized" or "reference"; a teacher has none.
        dtype: of the weights, by its name in torch.
        batch_size: conversations at once, padded on the left.
        device: None = this process's GPU, else the CPU.
        max_num_frames: of a video, evenly thinned.
        max_pixels: bound on the pixels of an image or a frame; 0 = the processor's own.
    Raises:
        ValueError: for a folder that holds neither, and for a batch size that is no number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        backend: str = "optimized",
        dtype: str = "bfloat16",
        batch_size: int | str = 1,
        device: str | None = None,
        max_num_frames: int = 32,
        max_pixels: int = 0,
    ) -> None:
        super().__init__()
        require(str(batch_size).isdigit(), WHERE, "batch_size must be a whole number", batch_size)
        process = PartialState()
        self._rank, self._world_size = process.process_index, process.num_processes
        self.device = process.device if device in (None, "cuda") else torch.device(device)
        self.batch_size = int(batch_size)
        self.model = open_model(str(pretrained), getattr(torch, dtype), backend).to(self.device).eval()
        self.processor = load_processor(str(pretrained), padding_side="left")
        self.tokenizer = self.processor.tokenizer
        self.collator = ChatCollator(self.processor, supervise="nothing")
        self.media = Media(Path(), max_pixels=max_pixels, max_frames=max_num_frames)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests, whose `args` are (text, doc_to_messages, settings, doc_id, task, split).

        Raises:
            ValueError: for a document that cannot be asked, by task and number.
        """
        collator = Collator([request.args for request in requests], lambda args: -len(args[0]),
                            group_fn=lambda args: args[2], grouping=True)  # fmt: skip
        answers: list[str] = []
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as progress:
            for batch in collator.get_batched(n=self.batch_size):
                conversations = [{"messages": self.conversation(*args)} for args in batch]
                answers += self.answer(conversations, batch[0][2])
                progress.update(len(batch))
        return collator.get_original(answers)

    def conversation(
        self, text: str, doc_to_messages: Any, settings: Any, doc_id: int, task: str, split: str
    ) -> list[dict[str, Any]]:
        """One document as turns, their pictures open."""
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        try:
            return [
                {"role": turn["role"], "content": [opened(block, self.media) for block in turn["content"]]}
                for turn in messages
            ]
        except (ValueError, OSError) as error:
            raise ValueError(f"{WHERE}: document {doc_id} of {task}: {error}") from error

    @torch.no_grad()
    def answer(self, conversations: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
        """What follows each conversation, up to the first of the task's stops."""
        batch = {
            name: tensor.to(self.device, self.model.dtype if tensor.is_floating_point() else None)
            for name, tensor in self.collator(conversations).items()
        }
        tokens = self.model.generate(**batch, **generation_arguments(settings))
        texts = self.tokenizer.batch_decode(
            tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop not in NOT_STOPS]
        for stop in filter(None, stops):
            texts = [text.partition(stop)[0] for text in texts]
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: lmms-eval asks chat models to generate."""
        raise NotImplementedError(f"{WHERE}: tasks must be generate_until, got loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused."""
        raise NotImplementedError(f"{WHERE}: tasks must be generate_until, got generate_until_multi_round")


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` tells lmms-eval."""
    return ModelManifest("linmu", chat_class_path=f"{LinMU.__module__}.{LinMU.__qualname__}")


def open_model(name: str, dtype: torch.dtype, backend: str) -> PreTrainedModel:
    """A teacher or a student.

    Raises:
        ValueError: for anything else.
    """
    model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type", "")
    if model_type.startswith("linmu_"):
        return load(name, dtype=dtype, linmu_backend=backend)
    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)


def opened(block: Mapping[str, Any], media: Media) -> dict[str, Any]:
    """A content block of lmms-eval as one of ours, its picture open.

    Raises:
        ValueError: for sound, for a part of a video, and as `Media` does.
    """
    kind = block["type"]
    if kind == "text":
        return {"type": "text", "text": block["text"]}
    if kind == "image":
        return {"type": "image", "image": media.image(block["url"])}
    require(kind == "video", WHERE, "a content block must be text, an image or a video", kind)
    cut = [name for name in ("start_time", "end_time") if block.get(name) is not None]
    if isinstance(block["url"], Mapping):
        cut += [name for name in ("video_start", "video_end") if name in block["url"]]
    require(not cut, WHERE, "a video must be asked about as a whole", cut, "such a task needs files cut out")
    return {"type": "video"} | media.video(block["url"])


def generation_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings as generate() takes them: greedy without a temperature; those of other libraries
    (`until`, `image_aspect_ratio`) left out."""
    known = GenerationConfig()
    given = {name: value for name, value in settings.items() if hasattr(known, name)}
    sampling = {"do_sample": True} if (given.get("temperature") or 0) > 0 else GREEDY
    return {"max_new_tokens": 128} | given | sampling
