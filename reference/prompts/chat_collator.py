"""From conversations to tensors.

    conversation = turns; a turn = {"role", "content": text or a list of blocks}
    block        = {"type": "text", "text"} | {"type": "image", "image"} | {"type": "video", "video", "fps"}

A *content block* is what chat templates call an entry of `content`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

IGNORED = -100
ANSWER_HEADER = "<|im_start|>assistant\n"
TURN_END = "<|im_end|>"


class ChatCollator:
    """Collates items {"messages": conversation} into one batch of tensors for a Qwen-style chat model.

    Args:
        processor: of `load_processor`.
        supervise: True: whole conversations with `labels`, -100 outside the assistant's answers; an answer's
            <|im_end|> belongs to it. False: prompts, cut before a final assistant turn, opened for an answer.

    A video block may carry `fps`, the frames per second of what it holds; it becomes `second_per_grid_ts`.
    """

    def __init__(self, processor: ProcessorMixin, *, supervise: bool = True):
        tokenizer = processor.tokenizer
        if TURN_END not in tokenizer.get_vocab():
            raise ValueError(
                f"ChatCollator: the chat template must close turns with {TURN_END}, got another family"
            )
        self.processor = processor
        self.supervise = supervise
        self.header = np.array(tokenizer(ANSWER_HEADER, add_special_tokens=False)["input_ids"])
        self.end = tokenizer.convert_tokens_to_ids(TURN_END)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask, mm_token_type_ids, labels, all (B, L) int64, pixels and grids."""
        conversations = [list(item["messages"]) for item in items]
        if not self.supervise:
            conversations = [c[:-1] if c[-1]["role"] == "assistant" else c for c in conversations]
        processor_kwargs: dict[str, Any] = {"padding": True}
        if metadata := _video_metadata(conversations):
            processor_kwargs["video_metadata"] = metadata
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not self.supervise,
            processor_kwargs=processor_kwargs,
        )
        batch = dict(batch)
        if self.supervise:
            turns = [sum(turn["role"] == "assistant" for turn in c) for c in conversations]
            batch["labels"] = self._labels(batch["input_ids"].numpy(), batch["attention_mask"].numpy(), turns)
        return batch

    def _labels(self, ids: np.ndarray, valid: np.ndarray, turns: Sequence[int]) -> torch.Tensor:
        """Keep the ids from after each answer header up to and including the next <|im_end|>."""
        answers, found = answer_mask(ids, self.header, self.end)
        if (found != np.array(turns)).any():
            row = int(np.argmax(found != np.array(turns)))
            raise ValueError(
                f"ChatCollator: every assistant turn must follow {ANSWER_HEADER!r}, got {found[row]} headers "
                f"for {turns[row]} turns in item {row}; an answer must not begin with a line break"
            )
        return torch.from_numpy(np.where(answers & (valid > 0), ids, IGNORED))


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
    blocks = [
        block
        for conversation in conversations
        for turn in conversation
        if not isinstance(turn["content"], str)
        for block in turn["content"]
        if block["type"] == "video"
    ]
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
