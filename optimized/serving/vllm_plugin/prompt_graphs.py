"""A lone short prompt from a CUDA graph: launching kernels one by one takes the host longer than they run.

A graph computes one prompt of text from its first token on, of at most so many tokens: padded in front, as by
generate(). Any other step, with pictures, several requests, or a part of a prompt, runs eagerly. Graphs are
captured when the server captures its steps of decoding, and again if its pools have moved since. Only on
request: see `settings.untried_options`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...graphs.capture import Capture
from .layer import Prompts, StateLayer, Step

LENGTHS = (128, 256, 512, 768, 1024, 1536, 2048, 3072)  # longer ones keep the GPU busy by themselves


class PromptGraphs:
    """Graphs of all lengths.

    Args:
        new_capture: makes what records functions, see `graphs.capture`, in one pool of memory.
        layers: all of the decoder's.
        angles: positions (..., L) int64 -> cosines and sines, (1, L, N) each.
        decode: embeddings (L, D) and positions -> hidden states (L, D), by the layers, with their `step` set.
        step: angles -> `Step` of a prompt of text.
        stream: of second branches; None = they come after the first.
    """

    def __init__(
        self,
        new_capture: Callable[[], Capture],
        layers: Sequence[StateLayer],
        angles: Callable[[Tensor], tuple[Tensor, Tensor]],
        decode: Callable[[Tensor, Tensor], Tensor],
        step: Callable[[tuple[Tensor, Tensor]], Step],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.stream = stream
        self.layers, self.angles, self.decode, self.step = layers, angles, decode, step
        self.new_capture = new_capture
        self.graphs: dict[int, LonePrompt] = {}
        self.pools: list[int] = []

    def capture(self, like: Tensor, positions: Tensor, lengths: Sequence[int] = LENGTHS) -> None:
        """Record all, unless they were for these pools.

        Args:
            like: embeddings, (·, D).
            positions: (·,), or (3, ·).
            lengths: of prompts.
        """
        pools = self.pools_now()
        if pools == self.pools:
            return
        self.graphs.clear()
        record = self.new_capture()  # a pool that no graph uses any more is gone
        for length in sorted(lengths, reverse=True):  # the largest makes the room that all share
            embeds = like.new_zeros(length, like.shape[-1])
            place = positions.new_zeros(*positions.shape[:-1], length)
            self.graphs[length] = LonePrompt(self, record, embeds, place)
        self.pools = pools

    def pools_now(self) -> list[int]:
        """Return where the pools are."""
        return [tensor.data_ptr() for layer in self.layers for tensor in layer.kv_cache]

    def find(self, tokens: int) -> LonePrompt | None:
        """Return the graph for a prompt of so many tokens; None = there is none."""
        lengths = sorted(self.graphs) if self.pools_now() == self.pools else []
        place = bisect_left(lengths, tokens)
        return self.graphs[lengths[place]] if place < len(lengths) else None


class LonePrompt:
    """One graph and what it reads.

    Args:
        graphs: whose it is.
        record: captures a function.
        embeds: (L, D), zeros.
        positions: (..., L), zeros.
    """

    def __init__(self, graphs: PromptGraphs, record: Capture, embeds: Tensor, positions: Tensor) -> None:
        self.embeds, self.positions, length = embeds, positions, len(embeds)
        self.row = torch.zeros(1, dtype=torch.int64, device=embeds.device)  # nobody's
        self.count = torch.ones_like(self.row)

        def run() -> Tensor:
            angles = graphs.angles(self.positions)
            place = torch.arange(length, device=embeds.device)[None]
            valid = place >= length - self.count
            step = graphs.step(angles)
            step.stream = graphs.stream
            run, none = slice(0, length), torch.zeros_like(self.count)
            shared = dict(step.prepare(None))
            step.lone = Prompts(
                self.row, place, run, place[0], None, valid, angles, None, False, none, self.count, shared
            )
            for layer in graphs.layers:
                layer.step = step
            return graphs.decode(self.embeds, self.positions)

        self.replay, self.output = record(run)

    def __call__(self, embeds: Tensor, positions: Tensor, row: Tensor) -> Tensor:
        """Compute a prompt.

        Args:
            embeds: (n, D), n <= L.
            positions: (..., n).
            row: (1,), where its states go.
        Returns:
            Hidden states, (n, D).
        """
        first = len(self.embeds) - len(embeds)
        self.embeds[:first].zero_()
        self.embeds[first:].copy_(embeds)
        self.positions[..., first:].copy_(positions)
        self.row.copy_(row)
        self.count.fill_(len(embeds))
        self.replay()
        return self.output[first:].clone()
