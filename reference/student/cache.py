"""What decoding keeps of a converted layer: one state of constant size, in a slot of Hugging Face's cache.

A cache has a slot per decoder layer. Layers that stay attention keep their growing keys and values; a
converted layer keeps an `MMATEState` and counts the tokens it has seen: conv (B, K-1, channels) and scan
(B, H, N, P) in float32, and of the text window the last keys and values, (B, W-1, G, N) each, in the model's
dtype. A state's tensors belong to their slot alone, and the next token may overwrite them: to go on twice
from one place, copy the cache (`copy.deepcopy`). Models call the cache by the name `CACHE_NAME`; a student
takes either name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ..checks import require
from ..m_mate import DonatedMMATEState, MMATEState
from ..sliding_window_attention import DonatedWindowState, WindowState

CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument
_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = next(name for name in CACHE_NAMES if name in _ARGUMENTS)


class LinMUCacheLayer(CacheLayerMixin):
    """The slot of one converted layer; it also answers what Hugging Face asks every slot about lengths."""

    is_compileable = False  # generate() would build four-dimensional masks for a compileable cache
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MMATEState | None = None
        self.seen_tokens = 0

    def donate(self) -> DonatedMMATEState | None:
        """Hand out the state for in-place update; call `store` with the result. None before any token."""
        if self.state is None:
            return None
        conv, scan, window = self.state
        return DonatedMMATEState(conv, scan, None if window is None else DonatedWindowState(*window))

    def store(self, state: MMATEState, new_tokens: int) -> None:
        """Take over the state after `new_tokens` more tokens: its tensors are the slot's from now on."""
        window = None if state.window is None else WindowState(*state.window)
        self.state = MMATEState(state.conv, state.scan, window)
        self.seen_tokens += new_tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, padding included."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the padding mask that a forward of `query_length` tokens needs."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first `store` brings the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Refuse keys and values.

        Raises:
            RuntimeError: always; a cache filled by one model was given to another.
        """
        raise RuntimeError(
            "LinMUCacheLayer.update: a converted layer keeps a state, got keys and values; "
            "do not share a cache between teacher and student"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens.

        Raises:
            RuntimeError: always; a recurrent state cannot be rolled back.
        """
        raise RuntimeError(
            "LinMUCacheLayer.crop: tokens cannot be taken out of a recurrent state again; "
            "assisted decoding and prompt lookup need a model with attention in all layers"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen_tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue row `beam_idx[i]`."""
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Stay where it is: the state is small."""

    def prefetch(self) -> None:
        """Stay where it is: the state is small."""

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            conv, scan, window = self.state
            window = None if window is None else WindowState(*map(change, window))
            self.state = MMATEState(change(conv), change(scan), window)


def name_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache among a model's arguments, and leave it there under this transformers' name only.

    Raises:
        ValueError: if both names bring one.
    """
    caches = [cache for cache in [kwargs.pop(name, None) for name in CACHE_NAMES] if cache is not None]
    got = f"both {' and '.join(CACHE_NAMES)}"
    require(len(caches) < 2, "name_cache", "the cache must be given once", got, f"pass {CACHE_NAME}")
    if not caches:
        return None
    kwargs[CACHE_NAME] = caches[0]
    return caches[0]


def cache_slot(cache: Cache, layer_index: int) -> LinMUCacheLayer:
    """Return the slot of a converted layer, put in place on first use.

    Hugging Face makes the cache itself, in generate() and in forward, with attention's slots.

    Args:
        cache: the cache of this model's tokens so far.
        layer_index: index of the decoder layer.
    Raises:
        ValueError: if the cache is not a DynamicCache, or holds keys and values in this slot.
    """
    where = "cache_slot"
    dynamic = isinstance(cache, DynamicCache)
    require(dynamic, where, "the cache must be a DynamicCache", type(cache).__name__)
    while len(cache.layers) <= layer_index:
        cache.layers.append(cache.layer_class_to_replicate())
    slot = cache.layers[layer_index]
    if isinstance(slot, LinMUCacheLayer):
        return slot
    require(
        not slot.is_initialized,
        where,
        f"layer {layer_index} of the cache must be unused or hold this model's state",
        "keys and values",
        "do not share a cache between teacher and student; prefix tuning, which makes up keys and values, is "
        "not supported, prompt tuning and LoRA are",
    )
    cache.layers[layer_index] = LinMUCacheLayer()
    return cache.layers[layer_index]
