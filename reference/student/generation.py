"""generate() of a student: Hugging Face's, told where the vision tokens are.

Before the prefill Hugging Face replaces pixels and grids by embeddings, so that a forward could no longer
find the pictures. `generate` finds them first, and hands coordinates (B, L, 4) on as `linmu_coords`; every
forward gets those of its own tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ..checks import require
from ..prompts.grids import Placement, cuts_a_span, placement_coords
from ..prompts.layouts import PromptLayout
from .cache import name_cache

MODALITIES = ("image", "video")  # in the order of their numbers in `mm_token_type_ids`
NO_TOKEN = -1  # in the place of tokens in which no picture is looked for


def with_signature_of(other: Callable) -> Callable:
    """Give a method the signature of another: Hugging Face reads from it which arguments there are."""

    def decorate(method: Callable) -> Callable:
        method.__signature__ = inspect.signature(other)
        return method

    return decorate


class StudentGeneration:
    """The hooks of generate() that a student needs; put before a family's class.

    Attributes:
        prompt_layout: how the family's prompts show images and videos; None = a text decoder.
        token_loop: what runs in the place of Hugging Face's `_sample`, with the same arguments; None = that.
    """

    prompt_layout: PromptLayout | None = None
    token_loop: Callable | None = None
    _is_stateful = True  # a recurrent state cannot be rolled back: no assisted decoding

    def has_vision(self, inputs: dict[str, Any]) -> bool:
        """Say whether the arguments of a forward bring images or videos."""
        return self.prompt_layout is not None and self.prompt_layout.has_vision(inputs)

    def placeholder_types(self, input_ids: Tensor) -> Tensor:
        """Say what ids may stand for: (B, L) int64 -> (B, L) int64, 0 = text, 1 = image, 2 = video."""
        types = torch.zeros_like(input_ids)
        for number, modality in enumerate(() if self.prompt_layout is None else MODALITIES, start=1):
            if modality in self.prompt_layout.arguments:
                types[input_ids == getattr(self.config, f"{modality}_token_id")] = number
        return types

    def placements(self, input_ids: Tensor, inputs: dict[str, Any], past: int = 0) -> list[Placement]:
        """Return the segments of a batch, where the prompts gave pictures: other placeholders are text.

        Args:
            input_ids: (B, L) int64; a placeholder may also be a token that was sampled.
            inputs: the arguments of forward; `mm_token_type_ids` (B, L), 0 = text, tell the two apart.
            past: how many of the tokens are looked at no more.
        Raises:
            ValueError: if placeholders and inputs do not fit.
        """
        types = inputs.get("mm_token_type_ids")
        is_text = torch.arange(input_ids.shape[1], device=input_ids.device) < past
        if types is not None and types.shape == input_ids.shape:
            is_text = is_text | (types.to(input_ids.device) == 0)
        ids = input_ids.masked_fill(is_text & (self.placeholder_types(input_ids) > 0), NO_TOKEN)
        return self.prompt_layout.placements(self.config, ids, inputs)

    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs):
        """Generate as Hugging Face does, with a cache of constant size.

        A later turn continues from an earlier one's `cache` with the whole conversation's `input_ids`, and
        grids and pixels of the whole conversation, or of what is new. What the cache has seen is not encoded
        again.

        Raises:
            ValueError: for assisted decoding, prompt lookup and caches that are not dynamic, and for prefill
                in chunks that cut an image or video.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        cache = name_cache(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        if input_ids is not None and self.has_vision(kwargs):
            if past:
                self._check_whole_conversation(past, input_ids, kwargs)
            placements, are_new = self._find_placements(past, input_ids, kwargs)
            if kwargs.get("linmu_coords") is None:
                coords = placement_coords(placements, input_ids.shape, input_ids.device)
                kwargs["linmu_coords"] = coords
            if past:
                if kwargs.get("position_ids") is None:
                    kwargs["position_ids"] = self._positions(past, input_ids, are_new, kwargs)
                self.prompt_layout.drop_cached(self.config, placements, past, kwargs)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    @with_signature_of(GenerationMixin._sample)
    def _sample(self, *args, **kwargs):
        """Choose tokens one by one, the likeliest or by chance."""
        if self.token_loop is None:
            return super()._sample(*args, **kwargs)
        return self.token_loop(self, *args, **kwargs)

    def _check_whole_conversation(self, past: int, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        """Bring masks and token types to the length of the conversation, and refuse a part of it."""
        mask = kwargs.get("attention_mask")
        mask = kwargs["attention_mask"] = torch.ones_like(input_ids) if mask is None else mask
        must = f"input_ids must be the whole conversation, more than the {past} tokens of the cache"
        whole = input_ids.shape == mask.shape and input_ids.shape[1] > past
        require(whole, "generate", must, f"{tuple(input_ids.shape)}, attention_mask {tuple(mask.shape)}")
        types = kwargs.get("mm_token_type_ids")
        missing = 0 if types is None else input_ids.shape[1] - types.shape[1]
        if missing > 0:  # those of the first turn: what followed says by its ids what it is
            new = self.placeholder_types(input_ids[:, -missing:]).to(types.dtype)
            kwargs["mm_token_type_ids"] = torch.cat([types, new], dim=1)

    def _find_placements(
        self, past: int, input_ids: Tensor, kwargs: dict[str, Any]
    ) -> tuple[list[Placement], bool]:
        """Return the segments of a conversation, and whether only the new ones were given."""
        try:
            return self.placements(input_ids, kwargs), False
        except ValueError:
            if past:
                with suppress(ValueError):
                    return self.placements(input_ids, kwargs, past), True
            raise

    def _positions(self, past: int, input_ids: Tensor, are_new: bool, kwargs: dict[str, Any]) -> Tensor:
        """Return the position ids of a later turn: those of Hugging Face, M-RoPE's included."""
        model = self.base_model
        if not hasattr(model, "rope_deltas"):
            return self._prepare_position_ids_for_generation(input_ids, kwargs)
        if not are_new:
            model.rope_deltas = None  # of an earlier call, perhaps on another prompt
            return self._prepare_position_ids_for_generation(input_ids, kwargs)
        must = "the model must have made the cache in its last call of generate()"
        before = model.rope_deltas
        hint = "pass the grids and pixels of the whole conversation"
        require(before is not None and len(before) == len(input_ids), "generate", must, "another one", hint)
        mask = kwargs["attention_mask"]
        types = kwargs.get("mm_token_type_ids")
        types = self.placeholder_types(input_ids) if types is None else types
        whole = {"input_ids": input_ids, "attention_mask": mask, "mm_token_type_ids": types}
        new = {name: value[:, past:] for name, value in whole.items()}
        vision, deltas = rope_index(self, {**kwargs, **new})
        text = (mask.long().cumsum(-1) - 1).clamp(min=0)
        positions = text.expand(3, -1, -1).clone()
        positions[:, :, past:] = vision + (mask[:, :past].sum(-1, keepdim=True) + before)
        model.rope_deltas = before + deltas
        return torch.cat([text[None], positions])

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat rows for beams and samples; older transformers would deal the pictures out one by one."""
        pictures = {}
        if expand_size > 1 and input_ids is not None and self.has_vision(kwargs):
            layout = self.prompt_layout
            placements = self.placements(input_ids, kwargs)
            layout.repeat_rows(self.config, placements, expand_size, kwargs)
            pictures = {name: kwargs.pop(name) for name in layout.argument_names if name in kwargs}
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, kwargs | pictures

    @with_signature_of(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args, **kwargs) -> dict[str, Any]:
        """Prepare one forward of generate(): Hugging Face's arguments, and the coordinates of the tokens in
        it.

        Raises:
            ValueError: if the forward would begin or end inside an image or video.
        """
        cache = name_cache(kwargs)
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        coords = model_inputs.pop("linmu_coords", None)
        reads_prompt = kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True)
        if not reads_prompt and self.prompt_layout is not None:
            # some transformers keep passing the prompt's grids
            names = self.prompt_layout.argument_names
            return {name: value for name, value in model_inputs.items() if name not in names}
        if coords is None:
            return model_inputs
        tokens = model_inputs.get("inputs_embeds")
        length = (model_inputs["input_ids"] if tokens is None else tokens).shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        return model_inputs | {"linmu_coords": coords_between(coords, past, past + length)}

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse continuous batching, of `generate_batch` as well.

        Raises:
            ValueError: always; it pages keys and values, and a student keeps a state instead.
        """
        must = "continuous batching needs keys and values that can be paged"
        hint = "generate() takes batches of any lengths, padded; to serve many at once, use vLLM"
        require(False, "generate_batch", must, "a student, which keeps states", hint)

    def _validate_generation_mode(self, generation_mode, generation_config: GenerationConfig, kwargs) -> None:
        super()._validate_generation_mode(generation_mode, generation_config, kwargs)
        implementation = generation_config.cache_implementation
        dynamic = implementation in (None, "dynamic", "dynamic_full")
        require(dynamic, "generate", "cache_implementation must be dynamic", implementation)
        encodes_first = "mm_encoder_outputs" in inspect.signature(self.forward).parameters
        encodes_first = encodes_first or self.prompt_layout is None
        require(
            generation_config.prefill_chunk_size is None or encodes_first,
            "generate",
            "prefill_chunk_size needs a transformers that encodes images before the prefill",
            generation_config.prefill_chunk_size,
            "upgrade transformers, or prefill through forward",
        )


def has_m_rope(student: PreTrainedModel, given: Mapping[str, Any]) -> bool:
    """Say whether a forward's arguments have pictures that M-RoPE can place."""
    compute = getattr(student.base_model, "get_rope_index", None)
    if compute is None or given.get("input_ids") is None or not student.has_vision(given):
        return False
    types = "mm_token_type_ids"
    return given.get(types) is not None or types not in inspect.signature(compute).parameters


def rope_index(student: PreTrainedModel, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """M-RoPE positions (3, B, L) of a prompt with vision, and what later tokens' are ahead, (B, 1).

    Args:
        student: of a Qwen-VL family.
        given: what its `get_rope_index` may take, whose arguments differ between versions; None = not given.
    """
    compute = student.base_model.get_rope_index
    taken = inspect.signature(compute).parameters
    return compute(**{name: given[name] for name in taken if given.get(name) is not None})


def coords_between(coords: Tensor, start: int, end: int) -> Tensor:
    """Return coords (B, L, 4) of the positions [start, end): -1 beyond L, where generated text is."""
    for position in (start, end):
        must = "prefill must not be split inside an image or video"
        whole = not cuts_a_span(coords, position)
        hint = "choose another prefill_chunk_size"
        require(whole, "generate", must, f"a split before position {position}", hint)
    return F.pad(coords, (0, 0, 0, max(0, end - coords.shape[1])), value=-1)[:, start:end]
