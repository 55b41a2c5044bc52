"""From samples to rows of a fixed number of tokens, several samples in each.

Letters: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import require
from .chat_collator import IGNORED, ChatCollator, of_one_size

ROWS_OF_TILES = "pixel_attention_mask"  # of families whose pixels have an axis of prompts
Sample = dict[str, Tensor]  # a conversation alone, its tokens (1, L)


class PackingCollator:
    """Collates items {"messages": conversation} as `ChatCollator`, side by side instead of each in its row.

    Each sample goes into the first row that has room for it, in the order of the items; what is left of a row
    is padding. Samples of a row share nothing: `linmu_sequence` tells them apart, positions start anew, and
    nobody predicts the first token of a sample.

    Args:
        collator: makes tensors of a sample.
        row_tokens: T.
    Raises:
        ValueError: if T is below 1; on use for a sample of more tokens, and for a family whose pixels come in
            rows, one for each prompt.
    """

    def __init__(self, collator: ChatCollator, row_tokens: int) -> None:
        require(row_tokens >= 1, "PackingCollator", "row_tokens must be at least 1", row_tokens)
        self.collator, self.row_tokens = collator, row_tokens

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: input_ids, attention_mask, mm_token_type_ids, labels, position_ids and linmu_sequence, all
        (R, T) int64; pixels, grids."""
        return self._in_rows(self._rows(items))

    def with_names(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch to train on: the tensors, and `names`, for each row those of its samples."""
        rows = self._rows(items)
        names = [", ".join(items[place].get("name", "?") for place, _ in row) for row in rows]
        return self._in_rows(rows) | {"names": names}

    def _rows(self, items: Sequence[Mapping[str, Any]]) -> list[list[tuple[int, Sample]]]:
        """Which samples share a row, each with its place among the items."""
        rows: list[list[tuple[int, Sample]]] = []
        free: list[int] = []
        for place, item in enumerate(items):
            sample = item["tensors"] if "tensors" in item else self.collator([item])
            tokens = self._tokens(sample, item.get("name", "?"))
            row = next((row for row, room in enumerate(free) if room >= tokens), len(rows))
            if row == len(rows):
                rows.append([])
                free.append(self.row_tokens)
            rows[row].append((place, sample))
            free[row] -= tokens
        return rows

    def _tokens(self, sample: Sample, name: str) -> int:
        """The tokens of a sample that can be packed."""
        tokens = sample["input_ids"].shape[1]
        must = f"a sample must have at most the {self.row_tokens} tokens of a row"
        require(tokens <= self.row_tokens, "PackingCollator", must, f"{tokens} in {name}")
        must, hint = "a row must hold pictures of any number of samples", "train this family without packing"
        got = f"{ROWS_OF_TILES}, a row of tiles for each prompt"
        require(ROWS_OF_TILES not in sample, "PackingCollator", must, got, hint)
        return tokens

    def _in_rows(self, rows: list[list[tuple[int, Sample]]]) -> dict[str, Tensor]:
        """The tensors of a batch; pictures come in the order of the rows."""
        samples, batch = [sample for row in rows for _, sample in row], {}
        names = dict.fromkeys(name for sample in samples for name in sample)
        per_token = self.collator.padding | dict.fromkeys(("position_ids", "linmu_sequence"), 0)
        for name, fill in per_token.items():
            if name in names or name not in self.collator.padding:
                batch[name] = torch.full((len(rows), self.row_tokens), fill)
        for name in names.keys() - batch.keys():
            given = [sample[name] for sample in samples if name in sample]
            batch[name] = torch.cat(of_one_size(name, given))
        for place, row in enumerate(rows):
            start = 0
            for number, (_, sample) in enumerate(row):
                own = slice(start, start + sample["input_ids"].shape[1])
                for name in sample.keys() & per_token.keys():
                    batch[name][place, own] = sample[name][0]
                batch["position_ids"][place, own] = torch.arange(own.stop - start)
                batch["linmu_sequence"][place, own] = number
                if "labels" in batch:
                    batch["labels"][place, start] = IGNORED
                start = own.stop
        return batch
