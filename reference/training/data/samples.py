"""One sample as tensors, checked on its own; then samples padded to a batch.

A sample is made into tensors alone, by the process that reads it, so that one that is too long or does not
fit the chat template can be named and left out. Padded together, samples give what the processor gives for
them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin

from ...checks import require
from ...prompts.chat_collator import IGNORED, ChatCollator
from .turns import blocks

ALONG_TOKENS = {"input_ids": None, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}


class Encoder:
    """Samples to tensors.

    Args:
        processor: of `load_processor`, padding on the right.
        supervise: "answers": labels are the assistant's answers with their ends; "all": all text, so what a
            user asks, too. Vision tokens and padding are never supervised.
        max_length: tokens that a sample may have; 0 = any number.
    """

    def __init__(self, processor: ProcessorMixin, supervise: str = "answers", max_length: int = 0) -> None:
        require(supervise in ("answers", "all"), "Encoder", "supervise must be answers or all", supervise)
        self.processor, self.supervise, self.max_length = processor, supervise, max_length
        self.collate = ChatCollator(processor)
        names = ("image_token", "video_token")
        self.placeholders = [token for name in names if (token := getattr(processor, name, None))]
        self.padding = {**ALONG_TOKENS, "input_ids": processor.tokenizer.pad_token_id}

    def encode(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """One sample {"kind", "messages"} as {"kind", "tensors"}.

        Raises:
            ValueError: if it does not fit the chat template, holds placeholders in its text, or is too long.
        """
        for block in blocks(item["messages"], "text"):
            for token in self.placeholders:
                if token in block["text"]:
                    raise ValueError(f"a text must hold no placeholder of the model, got {token}")
        return {"kind": item["kind"], "name": item.get("name", "?"), "tensors": self.tensors([item])}

    def tensors(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Several samples at once, not encoded before."""
        batch = self.collate(items)
        length = batch["input_ids"].shape[1]
        if self.max_length and length > self.max_length:
            raise ValueError(f"a sample must have at most {self.max_length} tokens, got {length}")
        if self.supervise == "all":
            text = batch["attention_mask"].bool() & (batch["mm_token_type_ids"] == 0)
            batch["labels"] = batch["input_ids"].where(text, torch.tensor(IGNORED))
        return batch

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch to train on: the tensors of `padded`, and the `names` of the samples."""
        return self.padded(items) | {"names": [item.get("name", "?") for item in items]}

    def padded(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: input_ids, attention_mask, mm_token_type_ids, labels, all (B, L) int64; pixels, grids."""
        if any("tensors" not in item for item in items):
            return self.tensors(items)
        samples = [item["tensors"] for item in items]
        longest = max(sample["input_ids"].shape[1] for sample in samples)
        batch = {}
        for name in dict.fromkeys(name for sample in samples for name in sample):
            tensors = [sample[name] for sample in samples if name in sample]
            if name in self.padding:
                fill = self.padding[name]
                tensors = [pad(tensor, (0, longest - tensor.shape[1]), value=fill) for tensor in tensors]
            batch[name] = torch.cat(tensors)
        return batch
