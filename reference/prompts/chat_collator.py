"""From conversations to tensors.

    conversation  = turns; a turn = {"role", "content": text or a list of content blocks}
    content block = {"type": "text", "text"} | {"type": "image", "image"} | {"type": "video", "video", "fps"}

Letters: B conversations, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin

from ..checks import require

IGNORED = -100
ANSWER_HEADER = "<|im_start|>assistant\n"
TURN_END = "<|im_end|>"
SUPERVISE = ("answers", "all", "nothing")


class ChatCollator:
    """Collates items {"messages": conversation} into one batch of tensors for a Qwen-style chat model.

    `collator(items)` is the one entrance. A data set may `encode` its samples one by one before, in the
    process that reads them, so that one that does not fit can be named and left out; padded together they
    give what the processor gives for them at once.

    Args:
        processor: of `load_processor`.
        supervise: "answers": `labels` are the assistant's answers, each with its <|im_end|>; "all": all
            text, so what a user asks, too; "nothing": prompts without labels, cut before a final assistant
            turn, opened for an answer. Vision tokens and padding are never supervised: -100.
        max_length: tokens that a conversation may have; 0 = any number.
    Raises:
        ValueError: for another family's chat template, or on use for a conversation that does not fit it,
            holds placeholders in its text, or is too long.

    A video block may carry `fps`, the frames per second of what it holds; it becomes `second_per_grid_ts`.
    """

    def __init__(self, processor: ProcessorMixin, *, supervise: str = "answers", max_length: int = 0) -> None:
        must = f"supervise must be one of {SUPERVISE}"
        require(supervise in SUPERVISE, "ChatCollator", must, repr(supervise))
        tokenizer = processor.tokenizer
        must = f"the chat template must close turns with {TURN_END}"
        require(TURN_END in tokenizer.get_vocab(), "ChatCollator", must, "another family")
        self.processor, self.supervise, self.max_length = processor, supervise, max_length
        self.header = np.array(tokenizer(ANSWER_HEADER, add_special_tokens=False)["input_ids"])
        self.end = tokenizer.convert_tokens_to_ids(TURN_END)
        self.padding = {"attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}
        self.padding["input_ids"] = tokenizer.pad_token_id
        names = ("image_token", "video_token")
        self.placeholders = [token for name in names if (token := getattr(processor, name, None))]

    def encode(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """One sample {"kind", "messages"} as {"kind", "name", "tensors"}, to be collated later."""
        return {"kind": item["kind"], "name": item.get("name", "?"), "tensors": self._tensors([item])}

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: input_ids, attention_mask, mm_token_type_ids, labels, all (B, L) int64; pixels, grids."""
        if any("tensors" not in item for item in items):
            return self._tensors(items)
        samples = [item["tensors"] for item in items]
        longest = max(sample["input_ids"].shape[1] for sample in samples)
        left = self.processor.tokenizer.padding_side == "left"
        batch = {}
        for name in dict.fromkeys(name for sample in samples for name in sample):
            tensors = [sample[name] for sample in samples if name in sample]
            if name in self.padding:
                missing = [longest - tensor.shape[1] for tensor in tensors]
                sides = [(count, 0) if left else (0, count) for count in missing]
                fill = self.padding[name]
                tensors = [pad(*given, value=fill) for given in zip(tensors, sides, strict=True)]
            batch[name] = torch.cat(tensors)
        return batch

    def with_names(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch to train on: the tensors, and the `names` of the samples."""
        return self(items) | {"names": [item.get("name", "?") for item in items]}

    def _tensors(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Items not encoded before."""
        conversations = [list(item["messages"]) for item in items]
        self._refuse_placeholders(conversations)
        prompts = self.supervise == "nothing"
        if prompts:
            conversations = [c[:-1] if c[-1]["role"] == "assistant" else c for c in conversations]
        processor_kwargs: dict[str, Any] = {"padding": True}
        if metadata := _video_metadata(conversations):
            processor_kwargs["video_metadata"] = metadata
        batch = dict(
            self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=prompts,
                processor_kwargs=processor_kwargs,
            )
        )
        length = batch["input_ids"].shape[1]
        must = f"a sample must have at most {self.max_length} tokens"
        require(not self.max_length or length <= self.max_length, "ChatCollator", must, length)
        if not prompts:
            batch["labels"] = self._labels(batch, conversations)
        return batch

    def _refuse_placeholders(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Text must not pass for an image."""
        for conversation in conversations:
            for block in content_blocks(conversation, "text"):
                for token in self.placeholders:
                    must = "a text must hold no placeholder of the model"
                    require(token not in block["text"], "ChatCollator", must, token)

    def _labels(
        self, batch: Mapping[str, Tensor], conversations: Sequence[Sequence[Mapping[str, Any]]]
    ) -> Tensor:
        """The ids to predict, -100 elsewhere; an answer goes from its header to the next <|im_end|>."""
        ids, valid = batch["input_ids"], batch["attention_mask"].bool()
        turns = np.array([sum(turn["role"] == "assistant" for turn in c) for c in conversations])
        answers, found = answer_mask(ids.numpy(), self.header, self.end)
        if (found != turns).any():
            row = int(np.argmax(found != turns))
            raise ValueError(
                f"ChatCollator: every assistant turn must follow {ANSWER_HEADER!r}, got {found[row]} headers "
                f"for {turns[row]} turns in item {row}; an answer must not begin with a line break"
            )
        taught = batch["mm_token_type_ids"] == 0 if self.supervise == "all" else torch.from_numpy(answers)
        return ids.where(taught & valid, torch.tensor(IGNORED))


def answer_mask(ids: np.ndarray, header: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the answers in ids (B, L).

    Returns:
        (B, L) bool, True from after a header up to and including the end token, and (B,) headers found.
    """
    batch, length = ids.shape
    follows = np.zeros((batch, length + 1), dtype=bool)
    if length >= len(header):
        windows = np.lib.stride_tricks.sliding_window_view(ids, len(header), axis=1)
        follows[:, len(header) :] = (windows == header).all(-1)
    after_end = np.zeros((batch, length + 1), dtype=bool)
    after_end[:, 1:] = ids == end
    place = np.arange(1, length + 2)
    opened = np.maximum.accumulate(np.where(follows, place, 0), axis=1)
    closed = np.maximum.accumulate(np.where(after_end, place, 0), axis=1)
    return (opened > closed)[:, :length], follows.sum(1)


def _video_metadata(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]] | None:
    """Return the metadata of all videos in order, or None if no block states its `fps`."""
    blocks = [block for conversation in conversations for block in content_blocks(conversation, "video")]
    if not any("fps" in block for block in blocks):
        return None
    return [
        {
            "total_num_frames": len(block["video"]),
            "fps": block.get("fps"),
            "frames_indices": [*range(len(block["video"]))],
        }
        for block in blocks
    ]


def content_blocks(messages: Sequence[Mapping[str, Any]], kind: str) -> Iterator[Mapping[str, Any]]:
    """All content blocks of a kind; a content that is a text is one text block."""
    for content in (message["content"] for message in messages):
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield from (block for block in blocks if block["type"] == kind)
