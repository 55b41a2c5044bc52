"""Tokens per second after a prompt, teacher and student, replayed from a CUDA graph where there is a GPU.

A graph holds `CHAIN` steps, each fed with the token that the one before chose. The caches are filled with
random numbers: the time does not depend on them. The teacher's keys and values lie in memory reserved for
prompt and chain together, of which a step reads just what it may see: no token is copied, none is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...reference.student.cache import cache_slot
from ..m_mate import MMATEState
from ..sliding_window_attention import WindowState
from .cases import Case, LeftOutError, clear_memory, first_line, values_of
from .kernels import OURS, Setting
from .models import METHODS, Pair, attention_of, cache_bytes, fastest_attention, name_of
from .timing import random, time_calls

CHAIN = 8  # steps in one graph
ONE, LARGEST = "batch 1", "largest batch"
SHARE = 0.85  # of the free memory that caches may fill
MOST_ROWS = 2048
COPIES = 1.1  # a step overwrites the student's states, the convolution's few inputs excepted
TRIES = 5


class ReservedCache:
    """The teacher's keys and values of a prompt, with room for the chain; `place` is the next token's."""

    def __init__(self, pair: Pair, layers: int, context: int, batch: int) -> None:
        _, groups, dim = pair.heads
        setting, shape = pair.setting, (batch, groups, context + CHAIN, dim)
        self.kept = [[random(shape, setting.dtype, setting.device) for _ in range(2)] for _ in range(layers)]
        self.context = self.place = context

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *args, **kwargs) -> list[Tensor]:
        """Store one token and return all up to it, as attention asks of a cache."""
        for kept, new in zip(self.kept[layer_index], (keys, values), strict=True):
            kept[:, :, self.place : self.place + 1] = new
        return [kept[:, :, : self.place + 1] for kept in self.kept[layer_index]]

    def start(self) -> None:
        """Go back to the prompt's end."""
        self.place = self.context

    def advance(self) -> None:
        """Go on to the next token."""
        self.place += 1

    def close(self) -> None:
        """Do nothing: the tokens lie where they belong."""

    @property
    def nbytes(self) -> int:
        """Bytes of the prompt's tokens."""
        per_token = sum(kept[:, :, :1].nbytes for layer in self.kept for kept in layer)
        return per_token * self.context


class StateCache(DynamicCache):
    """The student's states, which each chain starts from and leaves its last ones in."""

    def __init__(self, model: nn.Module, context: int, batch: int, setting: Setting) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.held: list[MMATEState] = []
        for index, layer in enumerate(model.get_decoder().layers):
            config = layer.self_attn.config
            shapes = (
                (batch, config.conv_kernel - 1, config.conv_channels),
                (batch, config.heads, config.head_dim, config.head_dim),
            )
            state = MMATEState(*(random(shape, torch.float32, setting.device) for shape in shapes))
            if config.text_window:
                near = (batch, config.text_window - 1, config.groups, config.head_dim)
                kept = (random(near, setting.dtype, setting.device) for _ in range(2))
                present = torch.ones(near[:2], dtype=torch.bool, device=setting.device)
                state = state._replace(window=WindowState(*kept, present))
            cache_slot(self, index).store(state, context)
            self.held.append(state)

    def start(self) -> None:
        """Read the held states again: a step overwrites the scan's, which no time depends on."""
        for slot, state in zip(self.layers, self.held, strict=True):
            slot.state = state

    def advance(self) -> None:
        """Do nothing: a state has no place."""

    def close(self) -> None:
        """Keep what the last step left."""
        for slot, state in zip(self.layers, self.held, strict=True):
            for kept, new in zip(state.tensors, slot.state.tensors, strict=True):
                kept.copy_(new)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return cache_bytes(self)


def decode_cases(
    pair: Pair, lengths: Sequence[int], setting: Setting, priority: Callable[[str, int], int]
) -> Iterator[Case]:
    """The lines of both models, one row and as many as fit; the latter on a GPU only."""
    batches = (ONE, LARGEST) if setting.device.type == "cuda" else (ONE,)
    for batch in batches:
        for method in METHODS:
            for length in lengths:
                run = partial(measure_decoding, pair, method, length, batch == LARGEST, setting)
                yield Case("decode", method, pair.size, batch, length, run, priority(method, length))


def measure_decoding(
    pair: Pair, method: str, context: int, largest: bool, setting: Setting
) -> dict[str, Any]:
    """The values of one line; rows are taken away until they fit."""
    model = pair.model(method)
    rows = rows_that_fit(pair, model, method, context, setting) if largest else 1
    for _ in range(TRIES):
        try:
            return measure_rows(pair, model, method, context, rows, setting)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        clear_memory()
        rows = max(1, int(rows * 0.8))
    raise LeftOutError(f"out of memory with {rows} rows")


def rows_that_fit(pair: Pair, model: nn.Module, method: str, context: int, setting: Setting) -> int:
    """How many rows' caches the free memory should hold."""
    clear_memory()
    free = torch.cuda.mem_get_info(setting.device)[0] * SHARE
    each = cache_of(pair, model, method, context, 1, setting).nbytes
    each *= COPIES if method == OURS else 1 + CHAIN / context
    return max(1, min(MOST_ROWS, int(free / each)))


def cache_of(
    pair: Pair, model: nn.Module, method: str, context: int, rows: int, setting: Setting
) -> StateCache | ReservedCache:
    """The model's cache after a prompt of `context` tokens."""
    if method == OURS:
        return StateCache(model, context, rows, setting)
    return ReservedCache(pair, len(model.get_decoder().layers), context, rows)


@torch.no_grad()
def measure_rows(
    pair: Pair, model: nn.Module, method: str, context: int, rows: int, setting: Setting
) -> dict[str, Any]:
    """Time a chain of steps for that many rows."""
    kernel = fastest_attention(pair.heads, 1, context, setting, rows) if method != OURS else None
    clear_memory()
    cache = cache_of(pair, model, method, context, rows, setting)
    token = torch.randint(4, 1000, (rows, 1), device=setting.device)
    places = torch.arange(context, context + CHAIN, device=setting.device)
    rotary = model.get_decoder().rotary_emb
    dummy = random((1, 1, 1), setting.dtype, setting.device)
    angles = [rotary(dummy, place.expand(3, rows, 1)) for place in places]
    with attention_of(kernel):
        call, how, peak = graphed(partial(chain, model, cache, token, angles), setting)
        timing = time_calls([call], setting.device, seconds=setting.seconds, most=50)
    values = values_of(timing, items=rows * CHAIN, batch=rows, cache_bytes=cache.nbytes, replayed=how)
    values["tokens_per_second"] = rows * CHAIN / timing.seconds
    return values | {"attention": name_of(kernel), "memory": peak}


def chain(model: nn.Module, cache: StateCache | ReservedCache, token: Tensor, angles: Sequence) -> Tensor:
    """`CHAIN` greedy tokens, (B, 1)."""
    cache.start()
    for angle in angles:
        token = step(model, cache, token, angle)
        cache.advance()
    cache.close()
    return token


def step(
    model: nn.Module, cache: StateCache | ReservedCache, token: Tensor, angle: tuple[Tensor, Tensor]
) -> Tensor:
    """One token through the decoder's layers, as its forward runs them without masks: (B, 1) -> (B, 1)."""
    decoder = model.get_decoder()
    hidden = decoder.embed_tokens(token)
    layout = {"linmu_layout": None} if isinstance(cache, StateCache) else {}
    for layer in decoder.layers:
        hidden = layer(hidden, position_embeddings=angle, past_key_values=cache, use_cache=True, **layout)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.lm_head(decoder.norm(hidden)).argmax(-1)


def graphed(call: Callable[[], object], setting: Setting) -> tuple[Callable[[], object], str, int | None]:
    """The call as a replay of a CUDA graph, in words what it is, and the bytes allocated at the peak of the
    runs before; on a CPU the call itself.
    """
    if setting.device.type != "cuda":
        return call, "eager", None
    torch.cuda.reset_peak_memory_stats(setting.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(setting.device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()
        return call, f"eager, since it cannot be captured: {first_line(error)}", peak
    return graph.replay, "CUDA graph", peak
