"""A decoder's forward from CUDA graphs: prompts by buckets of length, and decoding a token at a time.

Letters: B batch, L tokens, D width. What a call brings is brought into the shapes of its graph: a prompt is
padded on its left to the bucket's length, which is exact. Static buffers take all of it; then the graph runs,
layout and all, and its results are copied out. Embeddings, the vision tower and the logits are the model's
own, outside. What the host does before a graph is launched a user waits for; the rest it does meanwhile.

Decoding keeps the states in its graph's static buffers, and lends these to the slots of the cache. When
another cache decodes with the same graph, the first one's slots get copies of their own before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from ...reference.m_mate import MMATEState
from ...reference.sliding_window_attention import WindowState
from ...reference.student.cache import CACHE_NAME, LinMUCacheLayer, cache_slot, name_cache
from ..engine import say_once
from ..engine.beside import branches_beside
from ..engine.once import one_forward
from ..engine.operator import on_device_of
from ..layout import VisionLayout, fast
from ..m_mate import prepare_layers
from .capture import Capture, copies, copy_all
from .graphed_forward import GraphedForward
from .layers import through_layers
from .obstacles import arguments, state_of_torch
from .static_layout import StaticLayout, is_within_bounds

# The decoders whose forward is what `run_layers` does, and whether their positions are M-RoPE's.
DECODERS = {Qwen2Model: False, LlamaModel: False, Qwen2VLTextModel: True, Qwen2_5_VLTextModel: True}
ARGUMENTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", CACHE_NAME}
FIXED_ROPE = ("default", "linear", "yarn", "llama3")  # angles that follow from positions alone
TOKEN_AXES = {"embeds": 1, "positions": -1, "valid": 1, "coords": 1}  # of `token_tensors`
PADDING = {"coords": -1}  # what they hold in padding; the others 0
BESIDE = True  # whether a block's branches run beside each other
HOW_TO_TURN_OFF = "linmu.optimized.unaccelerate(student) turns the graphs off"


@dataclass(frozen=True)
class Limits:
    """What is captured at most.

    Args:
        lengths: the buckets of prompts, in tokens, rising.
        most_rows: of a batch.
        most_tokens: of a prompt's graph, all rows and padding together.
        most_graphs: that are kept; the one used longest ago goes first.
    """

    lengths: tuple[int, ...]
    most_rows: int
    most_tokens: int
    most_graphs: int

    def bucket(self, length: int) -> int | None:
        """The smallest of `lengths` that holds so many tokens; None = none does."""
        return next((bucket for bucket in self.lengths if bucket >= length), None)


class Request(NamedTuple):
    """One forward: embeds (B, L, D); positions (B, L) or (3, B, L); valid (B, L), 0 = padding, None = all
    valid; the layout, None = text; each layer's state, none = there were no tokens before.
    """

    embeds: Tensor
    positions: Tensor
    valid: Tensor | None
    layout: VisionLayout | None
    states: list[MMATEState]


@dataclass
class Graph:
    """A captured run of the layers.

    Args:
        tokens: static buffers of `token_tensors`, of the bucket's length.
        states: what it reads of the layers' states; of a decoding graph, where it leaves them, too.
        replay: runs it.
        hidden: (B, bucket, D), what it gives.
        after: the states that it leaves.
        slots: of the cache to which a decoding graph has lent `states`.
        blank: how many of the first tokens in the buffers are padding.
    """

    tokens: dict[str, Tensor]
    states: list[MMATEState]
    replay: Callable[[], None] | None = None
    hidden: Tensor | None = None
    after: list[MMATEState] = field(default_factory=list)
    slots: list[weakref.ref] = field(default_factory=list)
    blank: int = 0

    def take_tokens(self, tokens: dict[str, Tensor]) -> None:
        """Copy a request's tokens into the buffers, behind padding, which is blank from the calls before as
        far as it was padding then.
        """
        for name, value in tokens.items():
            buffer, axis = self.tokens[name], TOKEN_AXES[name]
            pad = buffer.shape[axis] - value.shape[axis]
            if pad > self.blank:
                buffer.narrow(axis, 0, pad).fill_(PADDING.get(name, 0))
            buffer.narrow(axis, pad, value.shape[axis]).copy_(value)
        self.blank = pad

    def take_states(self, slots: list[LinMUCacheLayer]) -> None:
        """Make these slots the holders of `states`, with their own values in it."""
        if any(slot.state is not state for slot, state in zip(slots, self.states, strict=True)):
            self.lend_states(slots, [slot.state for slot in slots])

    def lend_states(self, slots: list[LinMUCacheLayer], values: list[MMATEState]) -> None:
        """Put these values into `states`, and `states` into the slots."""
        self.give_back(slots)
        copy_all(tensors_of(self.states), tensors_of(values))
        for slot, state in zip(slots, self.states, strict=True):
            slot.state = state
        self.slots = [weakref.ref(slot) for slot in slots]

    def give_back(self, slots: list[LinMUCacheLayer]) -> None:
        """Leave the holders copies of their own, unless they are these slots."""
        for holder, state in zip(self.slots, self.states, strict=False):
            slot = holder()
            if slot is None or slot.state is None or slot in slots:
                continue
            lent = {id(tensor) for tensor in state.tensors}
            if any(id(tensor) in lent for tensor in slot.state.tensors):
                slot.state = state_of(copies(slot.state.tensors))
        self.slots = []


class GraphedDecoder(GraphedForward):
    """The forward of a student's decoder, from graphs where nothing watches it; put over the module's own.

    Args:
        decoder: one of `DECODERS`, all its layers converted.
        limits: what is captured.
        new_capture: makes what captures, on the decoder's device.
    """

    settings = (*GraphedForward.settings, "limits")

    def __init__(self, decoder: nn.Module, limits: Limits, new_capture: Callable[[], Capture]) -> None:
        self.limits = limits
        super().__init__(decoder, new_capture)

    def _start(self) -> None:
        super()._start()
        self.stream: torch.cuda.Stream | None = None  # of the second branch

    @property
    def nbytes(self) -> int:
        """Bytes of all static buffers, the graphs' own pool not counted."""
        held = [(*graph.tokens.values(), *tensors_of(graph.states)) for graph in self.graphs.values()]
        return sum(tensor.nbytes for tensors in held for tensor in tensors)

    def __call__(self, input_ids: Tensor | None = None, **given: Any) -> BaseModelOutputWithPast | tuple:
        """The decoder's forward: arguments, result and errors are the same.

        Raises:
            RuntimeError: if a graph cannot be captured or run.
        """
        if input_ids is not None:
            given["input_ids"] = input_ids
        if torch.compiler.is_compiling():
            return self.eager(**given)
        with self.lock:
            obstacle = self.obstacle(given)
            if obstacle is None:
                return on_device_of(self.module.embed_tokens.weight, self.run, given)
        say_once(f"graphs: {obstacle}", f"a forward runs without CUDA graphs: {obstacle}")
        return self.eager(**given)

    def obstacle(self, given: dict[str, Any]) -> str | None:
        """Why these arguments cannot run from a graph now; None = they can."""
        watch = self.drop_what_has_changed()
        name_cache(given)
        tokens = given.get("inputs_embeds")
        tokens = given.get("input_ids") if tokens is None else tokens
        if tokens is None or not tokens.numel() or tokens.device != self.device:
            return "no tokens on its device"
        found = state_of_torch(self.device) or watch.obstacle()
        found = found or arguments(given, ARGUMENTS, self.module.config)
        found = found or self.size_obstacle(tokens) or self.mask_obstacle(given, tokens)
        layout = fast(given.get("linmu_layout")) if found is None else None
        if layout is not None and not is_within_bounds(layout):
            return "coordinates with very large numbers"
        return found

    def size_obstacle(self, tokens: Tensor) -> str | None:
        """What of the limits (B, L) tokens exceed."""
        batch, length = tokens.shape[:2]
        if batch > self.limits.most_rows:
            return f"more than most_rows={self.limits.most_rows} rows"
        bucket = self.limits.bucket(length)
        if bucket is None:
            return f"prompts longer than the largest of lengths, {self.limits.lengths[-1]}"
        if batch * bucket > self.limits.most_tokens:
            return f"prompts of more than most_tokens={self.limits.most_tokens}, rows and padding together"
        return None

    def mask_obstacle(self, given: dict[str, Any], tokens: Tensor) -> str | None:
        """What masks and positions say that a graph has no place for."""
        (batch, length), mask, positions = (
            tokens.shape[:2],
            given.get("attention_mask"),
            given.get("position_ids"),
        )
        if mask is not None:
            is_padding = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch
            if not is_padding or mask.shape[1] < length:
                return "a mask other than (B, S)"
        use_cache = self.uses_cache(given)
        if given.get(CACHE_NAME) is not None and not use_cache:
            return "a cache with use_cache=False"
        if positions is None:
            return None
        if positions.ndim == 2 and mask is None and not use_cache and not self.has_mrope:
            return "positions without mask and cache, which may be packed rows"
        *axes, rows, tokens = positions.shape
        fits = axes in ([[], [1], [3], [4]] if self.has_mrope else [[]])
        return None if fits and rows in (1, batch) and tokens == length else "positions of another shape"

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self.module.embed_tokens.weight.device

    @property
    def has_mrope(self) -> bool:
        """Whether positions have three axes."""
        return DECODERS[type(self.module)]

    def uses_cache(self, given: dict[str, Any]) -> bool:
        """Whether the caller wants a cache."""
        asked = given.get("use_cache")
        return bool(self.module.config.use_cache if asked is None else asked)

    def run(self, given: dict[str, Any]) -> BaseModelOutputWithPast:
        """The forward from graphs."""
        embeds, cache, uses_cache = given.get("inputs_embeds"), given.get(CACHE_NAME), self.uses_cache(given)
        if cache is None and uses_cache:
            cache = DynamicCache()  # its layers are all ours, whatever the configuration says
            cache.layers = [LinMUCacheLayer() for _ in self.module.layers]
        slots = [] if cache is None else slots_of(cache, len(self.module.layers))
        with torch.inference_mode(False), torch.no_grad():
            embeds = self.module.embed_tokens(given["input_ids"]) if embeds is None else embeds
            request = self.request(embeds, given, slots)
            is_token = embeds.shape[1] == 1 and request.layout is None and request.states
            try:
                hidden = self.decode(request, slots) if is_token else self.prefill(request, slots)
            except Exception as error:
                self.graphs.clear()
                kind = type(error).__name__
                raise RuntimeError(
                    f"accelerate: a forward must run from CUDA graphs, got {kind}: {error}; {HOW_TO_TURN_OFF}"
                ) from error
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_NAME: cache})

    def request(self, embeds: Tensor, given: dict[str, Any], slots: list[LinMUCacheLayer]) -> Request:
        """The arguments as graphs take them."""
        batch, length, _ = embeds.shape
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        valid = None if mask is None else mask[:, -length:]
        if positions is None:
            past = slots[0].seen_tokens if slots else 0
            positions = torch.arange(past, past + length, device=embeds.device)[None]
        if self.has_mrope and positions.ndim == 3:
            positions = positions[-3:]  # one before them would be that of text, for packed rows
        positions = positions.expand((3, batch, length) if self.has_mrope else (batch, length))
        states = [slot.state for slot in slots if slot.state is not None]
        return Request(embeds, positions, valid, fast(given.get("linmu_layout")), states)

    def decode(self, request: Request, slots: list[LinMUCacheLayer]) -> Tensor:
        """One token after others, (B, 1, D); the slots keep the states."""
        tokens = token_tensors(request, masked=True)
        key = ("token", len(request.embeds), request.embeds.dtype)
        graph, is_new = self.graph(key, tokens, 1, request.states)
        graph.take_states(slots)
        graph.take_tokens(tokens)
        if is_new:
            before = copies(tensors_of(graph.states))
            self.record(graph, keeps_states=True)
            copy_all(tensors_of(graph.states), before)  # it was a token, too
        graph.replay()
        for slot in slots:
            slot.seen_tokens += 1
        return graph.hidden.clone()

    def prefill(self, request: Request, slots: list[LinMUCacheLayer]) -> Tensor:
        """Any other forward, (B, L, D); the slots get the new states."""
        batch, length, _ = request.embeds.shape
        bucket = self.limits.bucket(length)
        pad = bucket - length
        masked = pad > 0 or (request.valid is not None and not bool(request.valid.all()))
        tokens = token_tensors(request, masked)
        kinds = (masked, request.layout is not None, bool(request.states))
        key = ("prompt", batch, request.embeds.dtype, bucket, *kinds)
        graph, is_new = self.graph(key, tokens, bucket, request.states)
        graph.take_tokens(tokens)
        copy_all(tensors_of(graph.states), tensors_of(request.states))
        if is_new:
            self.record(graph, keeps_states=False)
            copy_all(tensors_of(graph.states), tensors_of(request.states))  # a run may overwrite them
        graph.replay()
        for slot, state in zip(slots, graph.after, strict=False):
            slot.store(state, length)
        self.keep(slots, graph.hidden, graph.after)
        return graph.hidden[:, pad:].clone()

    def keep(self, slots: list[LinMUCacheLayer], hidden: Tensor, after: list[MMATEState]) -> None:
        """Give the slots these values in memory that lasts: in that of the graph which will decode what
        follows `hidden`, if there is one.
        """
        if not slots:
            return
        decoding = self.graphs.get(("token", len(hidden), hidden.dtype))
        if decoding is not None:
            decoding.lend_states(slots, after)
            return
        new = iter(copies(tensors_of(after)))
        for slot, state in zip(slots, after, strict=True):
            slot.state = state_of([next(new) for _ in state.tensors])

    def graph(
        self, key: tuple, tokens: dict[str, Tensor], length: int, states: list[MMATEState]
    ) -> tuple[Graph, bool]:
        """The graph of this name, and whether it is new, with buffers like these, of so many tokens, and
        nothing captured.
        """
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key], False
        while len(self.graphs) >= self.limits.most_graphs:
            self.graphs.popitem(last=False)
        tokens = {name: padding_like(name, each, length) for name, each in tokens.items()}
        states = [state_of([zeros_like(tensor) for tensor in state.tensors]) for state in states]
        self.graphs[key] = Graph(tokens, states, blank=length)
        return self.graphs[key], True

    def record(self, graph: Graph, keeps_states: bool) -> None:
        """Capture the layers over a graph's buffers; with `keeps_states`, its states become those after."""

        def run() -> tuple[Tensor, list[MMATEState]]:
            tokens = dict(graph.tokens)
            coords = tokens.pop("coords", None)
            layout = None if coords is None else StaticLayout(coords)
            with branches_beside(self.stream):
                hidden, after = run_layers(self.module, **tokens, layout=layout, states=graph.states)
            if keeps_states:
                copy_all(tensors_of(graph.states), tensors_of(after))
            return hidden, after

        if self.capture is None:
            self.capture = self.new_capture()
            self.stream = second_stream(self.device)
        graph.replay, (graph.hidden, graph.after) = self.capture(run)


def second_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Where a block's second branch runs, beside the first; None = after it."""
    return torch.cuda.Stream(device) if BESIDE and device.type == "cuda" else None


def run_layers(
    decoder: nn.Module,
    embeds: Tensor,
    positions: Tensor,
    valid: Tensor | None = None,
    layout: VisionLayout | None = None,
    states: Sequence[MMATEState] = (),
) -> tuple[Tensor, list[MMATEState]]:
    """A decoder's forward between masks and logits: the normed hidden states (B, L, D) and all states after.

    Arguments as in `Request`; the states may be overwritten.
    """
    cache = DynamicCache()
    for index, state in enumerate(states):
        cache_slot(cache, index).state = state
    options = {CACHE_NAME: cache, "use_cache": True, "attention_mask": valid, "linmu_layout": layout}
    options["position_embeddings"] = decoder.rotary_emb(embeds, positions)
    with one_forward():
        prepare_layers([layer.self_attn for layer in decoder.layers], embeds, layout is None)
        hidden = through_layers(decoder, embeds, **options)
    return hidden, [slot.state for slot in cache.layers]


def slots_of(cache: Cache, layers: int) -> list[LinMUCacheLayer]:
    """`cache_slot` of all layers, at once if all are in place."""
    own = type(cache) is DynamicCache and len(cache.layers) == layers
    if own and all(type(slot) is LinMUCacheLayer for slot in cache.layers):
        return cache.layers
    return [cache_slot(cache, layer) for layer in range(layers)]


def token_tensors(request: Request, masked: bool) -> dict[str, Tensor]:
    """embeds and positions of a request, valid if `masked`, coords (B, L, 4) if there is a layout."""
    tokens = {"embeds": request.embeds, "positions": request.positions}
    if masked:
        valid = request.valid
        tokens["valid"] = request.embeds.new_ones((), dtype=torch.bool) if valid is None else valid
        tokens["valid"] = tokens["valid"].expand(request.embeds.shape[:2])
    if request.layout is not None:
        tokens["coords"] = request.layout.coords
    return tokens


def padding_like(name: str, tensor: Tensor, length: int) -> Tensor:
    """A static buffer for one of `token_tensors`, of so many tokens, all padding."""
    shape = list(tensor.shape)
    shape[TOKEN_AXES[name]] = length
    return torch.full(shape, PADDING.get(name, 0), dtype=tensor.dtype, device=tensor.device)


def tensors_of(states: Iterable[MMATEState]) -> list[Tensor]:
    """All tensors of some layers' states."""
    return [tensor for state in states for tensor in state.tensors]


def state_of(tensors: Sequence[Tensor]) -> MMATEState:
    """The inverse of `MMATEState.tensors`."""
    conv, scan, *window = tensors
    return MMATEState(conv, scan, WindowState(*window) if window else None)


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of that shape and dtype, contiguous."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
