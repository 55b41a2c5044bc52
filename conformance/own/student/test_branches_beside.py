"""Branches on two streams of a GPU never read what the other may not have written yet.

On a CPU a recorder stands for the streams: it knows which operation ran on which, and who waited for whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linmu import optimized
from linmu.optimized import m_mate
from linmu.optimized.engine.beside import branches_beside
from linmu.optimized.engine.once import one_forward
from linmu.optimized.graphs import decoder, install
from linmu.optimized.projections import join_columns, join_weights
from linmu.reference.student.cache import CACHE_NAME

from ..kernels.interpreter.pools import state_in_pool
from .test_generation import PROMPTS
from .tiny_checkpoint import batch, build_teacher, prompt, shake_mixers, words


class Stream:
    """A stream that knows up to which operation of each other one it has waited."""

    current: Stream

    def __init__(self) -> None:
        self.done = 0  # its own operations
        self.seen: dict[Stream, int] = {}

    def wait_stream(self, other: Stream) -> None:
        self.seen |= {each: max(self.seen.get(each, 0), done) for each, done in other.seen.items()}
        self.seen[other] = max(self.seen.get(other, 0), other.done)

    def has_waited_for(self, other: Stream, operation: int) -> bool:
        return self is other or self.seen.get(other, 0) >= operation


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


class Columns(NamedTuple):
    """Which columns of rows of so many elements a tensor has; all, if its rows lie end to end."""

    row: int
    low: int
    high: int

    @classmethod
    def of(cls, tensor: Tensor) -> Columns:
        if tensor.ndim < 2 or not tensor.numel():
            return cls(0, 0, 0)
        row, rest = tensor.stride(0), zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
        size = 1 + sum((n - 1) * stride for n, stride in rest)
        return cls(row, low := tensor.storage_offset() % row, low + size) if size < row else cls(0, 0, 0)

    def meet(self, other: Columns) -> bool:
        return self.row != other.row or not self.row or (self.low < other.high and other.low < self.high)


class Races(TorchDispatchMode):
    """Notes operations on memory that another stream has written, and that theirs has not waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, dict[Columns, tuple[Stream, int]]] = {}
        self.kept: list[Any] = []  # no memory is handed out twice
        self.found: list[str] = []
        self.streams: set[Stream] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, stream = function(*args, **kwargs or {}), Stream.current
        stream.done += 1
        self.streams.add(stream)
        self.kept.append((args, kwargs, result))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in read:
            for columns, when in self.written.get(place(leaf), {}).items():
                if columns.meet(Columns.of(leaf)) and not stream.has_waited_for(*when):
                    self.found.append(str(function))
        old = {place(leaf) for leaf in read}
        changed = [each for each, kind in zip(args, function._schema.arguments, strict=False) if writes(kind)]
        for leaf in tree_leaves((changed, result)):
            if isinstance(leaf, Tensor) and (place(leaf) not in old or changed):
                self.written.setdefault(place(leaf), {})[Columns.of(leaf)] = stream, stream.done
        return result


def writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def streams(monkeypatch) -> Stream:
    """A second stream beside the current one."""
    Stream.current, second = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return second


@pytest.fixture
def races(monkeypatch, streams) -> Callable[[nn.Module], Races]:
    """Lets a student run from graphs that are none, and says what it found."""
    second = streams
    monkeypatch.setattr(decoder, "second_stream", lambda device: second)

    def watched(student: nn.Module) -> Races:
        found = Races()

        def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            with found:
                result = run()
            assert Stream.current.seen[second] == second.done, "a stream must be joined before a capture ends"
            return lambda: None, result

        install(student, decoder.Limits((32, 64), 4, 256, 8), lambda: capture)
        return found

    return watched


STUDENTS = {
    "sees": lambda: optimized.convert(build_teacher(num_hidden_layers=4)),
    "scan_rope": lambda: optimized.convert(build_teacher(num_hidden_layers=4), {"scan_rope": True}),
    "no text window": lambda: optimized.convert(build_teacher(num_hidden_layers=4), {"text_window": 0}),
}


@pytest.fixture(scope="module", params=STUDENTS)
def student(request) -> nn.Module:
    return shake_mixers(STUDENTS[request.param]())


def run(student: nn.Module) -> None:
    """A prompt with a picture, text, padded rows; a token after each."""
    rows = batch([prompt(words(7, 1)), prompt(words(4, 2))])
    for inputs in (PROMPTS["image"](), prompt(words(40, 3)), rows):
        with torch.no_grad():
            cache = student(**inputs, use_cache=True)[CACHE_NAME]
            token = {"input_ids": inputs["input_ids"][:, -1:], CACHE_NAME: cache}
            mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            token["position_ids"] = mask.sum(1, keepdim=True).expand(3, -1, -1)
            student(**token, attention_mask=mask)


def test_no_branch_reads_what_the_other_is_writing(student, races):
    found = races(student)
    run(student)
    assert len(found.streams) == 2
    assert not found.found


def test_a_token_among_pools_of_states_reads_nothing_too_early(streams):
    found = races_among_pools(streams)
    assert len(found.streams) == 2 and not found.found
    assert Stream.current.seen[streams] == streams.done


def test_an_output_that_does_not_wait_for_the_second_branch_is_noticed(streams, monkeypatch):
    plant_no_join(monkeypatch)
    assert any("linear" in each or "mm" in each for each in races_among_pools(streams).found)


@torch.no_grad()
def races_among_pools(streams: Stream) -> Races:
    """Of a token as the plugin of vLLM captures it: weights joined, states overwritten where they are, both
    branches' heads side by side.
    """
    config = optimized.LinMUConfig(width=8, heads=4, groups=2, head_dim=4, text_window=3)
    blocks, u, found = [optimized.MMATE(config, index) for index in range(4)], torch.randn(6, 4, 8), Races()
    angles = torch.randn(6, 4, 4).cos(), torch.randn(6, 4, 4).sin()
    before, last = (tuple(each[:, part] for each in angles) for part in (slice(3), slice(3, 4)))
    states = [block(u[:, :3], position_embeddings=before)[1] for block in blocks]
    pooled = [state_in_pool(state, 4, torch.full((6,), 3)) for state in states]
    with one_forward():
        join_weights([block.joined_linears() for block in blocks])
        join_columns([block.output_linears() for block in blocks])
        with found, branches_beside(streams):
            y = u[:, 3:]
            for block, state in zip(blocks, pooled, strict=True):
                y, _ = block(y, position_embeddings=last, state=state)
    return found


def plant_no_join(monkeypatch) -> None:
    monkeypatch.setattr(m_mate.Fork, "join", lambda fork: None)


def plant_a_fork_in_the_first_layer(monkeypatch) -> None:
    monkeypatch.setattr(m_mate.MMATE, "may_fork", lambda block: True)


@pytest.mark.parametrize("plant", [plant_no_join, plant_a_fork_in_the_first_layer])
def test_planted_races_are_noticed(races, monkeypatch, plant):
    plant(monkeypatch)
    student = STUDENTS["sees"]()
    found = races(student)
    try:
        run(student)
    except (AssertionError, RuntimeError) as error:
        assert "must be joined" in str(error) or found.found
    assert found.found
