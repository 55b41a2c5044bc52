"""A student's whole forward over a prompt whose tokens are split over processes.

    with context_parallel(student, mesh):
        loss = student(**inputs, labels=labels).loss    # summed over the ranks: the loss of one process
        student.generate(**inputs)                      # the prefill is split; then every rank decodes alone

Letters: B batch, S tokens seen before, L tokens of this forward, n of them this rank's.

Every rank brings the same whole batch. What leads to the decoder, embeddings and vision tower, runs whole on
every rank (Choice: ids, pixels and their embeddings need no plan, and a tower that is trained gets each
rank's share of its gradients); the decoder and the head get the rank's n tokens. Converted layers run by
`ContextParallel`, one object for all of them; attention that was not converted, the teacher's beside a
student too, fetches all keys and values (Choice: one exchange, exact; a ring would keep fewer of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..checks import require
from ..layout import VisionLayout
from ..m_mate import MMATE, MMATEState
from .cache import CACHE_NAME, LinMUCacheLayer
from .context_parallel import ContextParallel, Operators, m_mate

WHERE = "context_parallel"


def evenly(length: int, ranks: int) -> list[int]:
    """Return how many of `length` tokens each rank holds: the same number, or one more."""
    edges = [length * rank // ranks for rank in range(ranks + 1)]
    return [end - start for start, end in pairwise(edges)]


@dataclass(frozen=True)
class Context:
    """How the prompts of a student are split.

    Args:
        mesh: of one dimension; its ranks hold a prompt's slices in order.
        lengths: (L, ranks) -> how many tokens each rank holds, each at least 1.
    """

    mesh: DeviceMesh
    lengths: Callable[[int, int], Sequence[int]] = evenly

    def slice(self, length: int) -> slice:
        """This rank's tokens of a prompt of `length`."""
        lengths, rank = self.lengths(length, self.mesh.size()), self.mesh.get_local_rank()
        start = sum(lengths[:rank])
        return slice(start, start + lengths[rank])

    def split(self, kwargs: dict[str, Any], sequence: Tensor | None, operators: Operators):
        """Return the `SplitForward` of a forward's arguments; None = a decoded token, which is not split.

        Args:
            kwargs: of the forward, changed in place.
            sequence: (B, L) int64, the samples of packed rows; None = one a row.
            operators: what each rank runs.
        Raises:
            ValueError: for router logits, for fewer tokens than ranks, and for a negative `logits_to_keep`.
        """
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get(CACHE_NAME)
        length = (kwargs["input_ids"] if embeds is None else embeds).shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        if length == 1 and past:
            return None
        routers = "output_router_logits"
        require(not kwargs.get(routers), WHERE, f"{routers} must be off", "the load of all experts' tokens")
        lengths = self.lengths(length, self.mesh.size())
        return SplitForward(ContextParallel(self.mesh, lengths, operators), kwargs, past, sequence)


@contextmanager
def context_parallel(
    student: nn.Module, mesh: DeviceMesh | None, lengths: Callable[[int, int], Sequence[int]] = evenly
) -> Iterator[None]:
    """Within, a student's forwards are split by tokens over the ranks of `mesh`, which all call it alike.

    A forward returns this rank's logits, of the tokens `lengths` gives it: of all of them, or of those of
    `logits_to_keep` positions it holds; the last k, `logits_to_keep=k`, come to every rank. Its loss is the
    rank's share: summed over the ranks, loss and gradients are those of one process. The cache that a forward
    fills is the whole prompt's, the same on every rank.

    Args:
        student: of any family.
        mesh: of one dimension; None = prompts stay whole. Every rank must call backward where one does.
        lengths: (L, ranks) -> how many tokens each rank holds, each at least 1.
    Raises:
        ValueError: for a mesh of several dimensions, and within another such context; in a forward, as
            `Context.split`.
    """
    if mesh is None:
        yield
        return
    require(mesh.ndim == 1, WHERE, "mesh must have one dimension", mesh.ndim, "take one, mesh['context']")
    must, hint = "a student's prompts must be split once", "leave the other context first"
    require(student.context is None, WHERE, must, student.context, hint)
    decoder = student.get_decoder()
    hooks = [
        decoder.register_forward_pre_hook(give_slice, with_kwargs=True, prepend=True),
        decoder.register_forward_hook(give_last_tokens, with_kwargs=True),
    ]
    student.context = Context(mesh, lengths)
    try:
        yield
    finally:
        student.context = None
        for hook in hooks:
            hook.remove()


def give_slice(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Give the decoder its rank's tokens."""
    split = kwargs.get("linmu_split")
    if split is None:
        return None
    require(not args, WHERE, "the decoder must be called by keywords", f"{len(args)} arguments by position")
    return args, split.of_decoder(kwargs)


def give_last_tokens(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Give every rank's head the prompt's last tokens, where these are what it is asked for."""
    split = kwargs.get("linmu_split")
    if split is not None and split.last:
        output.last_hidden_state = split.last_tokens(output.last_hidden_state)


class SplitForward:
    """One forward over a split prompt, passed to the layers as the keyword `linmu_split`.

    Args:
        parallel: who holds which tokens.
        kwargs: the forward's arguments, changed in place: what is asked of the head becomes this rank's.
        past: S.
        sequence: (B, L) int64, the samples of packed rows, of the whole prompt; None = one a row.

    Attributes:
        valid: (B, L) bool, True = not padding, of the whole prompt; None = all.
        labels: (B, n) int64, what follows each of this rank's tokens; None = no loss is asked for.
        last: how many of the last tokens every rank's head gets; 0 = it gets the rank's own.
    """

    def __init__(
        self, parallel: ContextParallel, kwargs: dict[str, Any], past: int, sequence: Tensor | None = None
    ) -> None:
        self.parallel, self.past, self.length = parallel, past, parallel.edges[-1]
        self.sequence = sequence
        mask = kwargs.get("attention_mask")
        valid = None if mask is None else mask[:, -self.length :].bool()
        self.valid = None if valid is None or bool(valid.all()) else valid
        self.attention_mask = mask
        self.labels, self.count = None, kwargs.pop("num_items_in_batch", None)
        if kwargs.get("labels") is not None:
            following = nn.functional.pad(kwargs.pop("labels"), (0, 1), value=-100)[:, 1:]
            self.labels = parallel.local(following).contiguous()
            self.count = (following != -100).sum() if self.count is None else self.count
        asked = kwargs.get("logits_to_keep")
        wrong = isinstance(asked, int) and asked < 0
        require(not wrong, WHERE, "logits_to_keep must be 0, a number of last tokens, or positions", asked)
        self.last = min(asked, self.length) if isinstance(asked, int) else 0
        if isinstance(asked, Tensor):
            start, stop = parallel.slice.start, parallel.slice.stop
            kwargs["logits_to_keep"] = asked[(start <= asked) & (asked < stop)] - start
        elif asked:
            kwargs["logits_to_keep"] = 0

    def of_decoder(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the decoder with this rank's tokens in the place of the prompt's."""
        mine, past = self.parallel.slice, self.past
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if tokens is None else tokens
        batch, new = tokens.shape[0], dict(kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.shape[:2] == (batch, self.length):
                new[name] = value[:, mine]
        if kwargs.get("deepstack_visual_embeds") is not None:
            seen = kwargs["visual_pos_masks"]
            kept = torch.zeros_like(seen)
            kept[:, mine] = True
            new["deepstack_visual_embeds"] = [each[kept[seen]] for each in kwargs["deepstack_visual_embeds"]]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + self.length, device=tokens.device)[None]
        new["position_ids"] = positions[..., mine]
        if kwargs.get("cache_position") is not None:
            new["cache_position"] = kwargs["cache_position"][mine]
        mask = self.attention_mask
        if mask is None:
            mask = torch.ones(batch, past + self.length, dtype=torch.bool, device=tokens.device)
        new["attention_mask"] = torch.cat([mask[:, :past], mask[:, past:][:, mine]], 1)
        return new

    def m_mate(
        self, block: MMATE, u: Tensor, layout: VisionLayout | None, **given: Any
    ) -> tuple[Tensor, MMATEState]:
        """`context_parallel.m_mate` under this forward's padding and samples, which a layout says itself."""
        given["sequence"] = self.sequence if layout is None else None
        return m_mate(self.parallel, block, u, layout, valid=self.valid, **given)

    def everything_before(self, keys: Tensor) -> Tensor:
        """Keys or values (B, G, S + n, N) of the past and of this rank -> (B, G, S + t, N), all that its last
        token, the t-th of the prompt, may see."""
        return self.whole(keys)[:, :, : self.past + self.parallel.slice.stop]

    def whole(self, keys: Tensor) -> Tensor:
        """Keys or values (B, G, S + n, N) of the past and of this rank -> (B, G, S + L, N), on every rank."""
        new = self.parallel.all_gather_tokens(keys[:, :, self.past :], dim=2)
        return torch.cat([keys[:, :, : self.past], new], 2) if self.past else new

    def last_tokens(self, hidden: Tensor) -> Tensor:
        """(B, n, D) of this rank -> (B, k, D), the last k = `last` of the prompt, on every rank."""
        start, stop = self.parallel.slice.start, self.parallel.slice.stop
        first = self.length - self.last
        held = hidden[:, max(first - start, 0) :]
        place = (max(start, first) - first, self.length - stop) if stop > first else (0, self.last)
        mine = nn.functional.pad(held if stop > first else hidden[:, :0], (0, 0, *place))
        return self.parallel.all_gather(mine).sum(0)

    def finish(self, student: nn.Module, outputs: Any, cache: Any) -> Any:
        """Return a forward's outputs with the loss, the cache being made whole.

        Args:
            student: whose loss it is.
            outputs: with this rank's logits (B, n, V).
            cache: the forward's; None = there is none.
        """
        for layer in () if cache is None else cache.layers:
            if not isinstance(layer, LinMUCacheLayer) and layer.is_initialized:
                layer.keys, layer.values = self.whole(layer.keys), self.whole(layer.values)
        if self.labels is None:
            return outputs
        text = student.config.get_text_config(decoder=True)
        loss = student.loss_function(
            logits=outputs.logits,
            labels=self.labels,
            shift_labels=self.labels,
            vocab_size=text.vocab_size,
            num_items_in_batch=self.count,
        )
        return type(outputs)(**{**outputs, "loss": loss})
