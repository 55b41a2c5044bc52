"""Held-out conversations in batches, made when they are needed, shared out over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ...prompts.chat_collator import ChatCollator
from ..config import Config
from ..data.conversations import ENDLESS, BrokenSampleError, Conversations, InOrder
from ..data.open_data import batch_of
from ..safety.distributed_means import processes


class OrComplaint(Dataset):
    """The same samples; a broken one is the complaint about it, never its neighbour."""

    def __init__(self, data: Dataset) -> None:
        self.data = strict(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            return self.data[index]
        except BrokenSampleError as error:
            return error.complaint


def strict(data: Dataset) -> Dataset:
    """The same samples, broken ones refused."""
    if isinstance(data, ConcatDataset):
        return ConcatDataset([strict(part) for part in data.datasets])
    if not isinstance(data, Conversations):
        return data
    options = (data.media.max_frames, data.media.max_pixels, data.lines, data.prepare)
    return Conversations(data.rows, "refuse", *options)


class HeldOut:
    """The first conversations of a data set, to be measured on; broken ones are left out.

    Args:
        data: held-out conversations.
        encoder: makes batches of them.
        config: the settings, of which how many, the batch size, workers and what to do about broken ones.
    """

    def __init__(self, data: Dataset, encoder: ChatCollator, config: Config) -> None:
        self.data = data
        self.samples = OrComplaint(data) if config.samples.on_broken == "skip" else strict(data)
        self.count = min(config.watch.eval_samples, len(data))
        self.encoder, self.config = encoder, config
        self.complaints: dict[str, None] = {}

    def share(self) -> str:
        """How much of the data is measured on, for those who meant all of it."""
        if self.count == len(self.data):
            return f"measured on all {self.count:,} conversations"
        there = "" if len(self.data) == ENDLESS else f" of {len(self.data):,}"
        return f"measured on the first {self.count:,}{there} conversations; --eval_samples takes more"

    def batches(self) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """Kinds and tensors of this process's batches.

        Raises:
            RefusedError: if no conversation can be read, or one cannot and broken samples are refused.
        """
        size, rank = self.config.optimizer.batch_size, dist.get_rank() if processes() > 1 else 0
        starts = range(rank * size, self.count, processes() * size)
        loader = DataLoader(
            InOrder(self.samples, self.count),
            batch_sampler=[range(start, min(start + size, self.count)) for start in starts],
            collate_fn=list,
            num_workers=self.config.samples.workers,
        )
        for items in loader:
            self.complaints |= dict.fromkeys(item for item in items if isinstance(item, str))
            items = [item for item in items if not isinstance(item, str)]
            if items:
                yield [item["kind"] for item in items], batch_of(self.encoder, items)

    def broken(self) -> list[str]:
        """What is wrong with the conversations that were left out, over all processes."""
        if processes() == 1:
            return [*self.complaints]
        every: list[Sequence[str]] = [[] for _ in range(processes())]
        dist.all_gather_object(every, [*self.complaints])
        return [complaint for part in every for complaint in part]
