"""generate() of a student: Hugging Face's, told where the vision tokens are.

Before the prefill Hugging Face replaces pixels and grids by embeddings, so that a forward could no longer
find the pictures. `generate` finds them first, and hands coordinates (B, L, 4) on as `linmu_coords`; every
forward gets those of its own tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from ..checks import require
from ..prompts.grids import cuts_a_block, placement_coords
from ..prompts.layouts import PromptLayout
from .cache import name_cache


class StudentGeneration:
    """The hooks of generate() that a student needs; put before a family's class.

    Attributes:
        prompt_layout: how the family's prompts show images and videos; None = a text decoder.
    """

    prompt_layout: PromptLayout | None = None
    _is_stateful = True  # a recurrent state cannot be rolled back: no assisted decoding

    def has_vision(self, inputs: dict[str, Any]) -> bool:
        """Say whether the arguments of a forward bring images or videos."""
        return self.prompt_layout is not None and self.prompt_layout.has_vision(inputs)

    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs):
        """Generate as Hugging Face does, with a cache of constant size.

        A later turn continues from an earlier one's `cache` with the whole conversation's `input_ids`, grids
        and pixels; what the cache has seen is not encoded again.

        Raises:
            ValueError: for assisted decoding, prompt lookup and caches that are not dynamic, and for prefill
                in chunks that cut an image or video.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        cache = name_cache(kwargs)
        if input_ids is not None and self.has_vision(kwargs):
            placements = self.prompt_layout.placements(self.config, input_ids, kwargs)
            if kwargs.get("linmu_coords") is None:
                coords = placement_coords(placements, input_ids.shape, input_ids.device)
                kwargs["linmu_coords"] = coords
            if cache is not None and cache.get_seq_length() > 0:
                self._continue_from(cache.get_seq_length(), input_ids, placements, kwargs)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def _continue_from(self, past: int, input_ids: Tensor, placements, kwargs: dict[str, Any]) -> None:
        """Prepare a later turn with vision: positions for the whole conversation, pixels for what is new."""
        mask = kwargs.get("attention_mask")
        mask = kwargs["attention_mask"] = torch.ones_like(input_ids) if mask is None else mask
        must = f"input_ids must be the whole conversation, more than the {past} tokens of the cache"
        whole = input_ids.shape == mask.shape and input_ids.shape[1] > past
        require(whole, "generate", must, f"{tuple(input_ids.shape)}, attention_mask {tuple(mask.shape)}")
        if kwargs.get("position_ids") is None:
            if hasattr(self.base_model, "rope_deltas"):
                self.base_model.rope_deltas = None  # of an earlier call, perhaps on another prompt
            kwargs["position_ids"] = self._prepare_position_ids_for_generation(input_ids, kwargs)
        self.prompt_layout.drop_cached(self.config, placements, past, kwargs)

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
            placements = layout.placements(self.config, input_ids, kwargs)
            layout.repeat_rows(self.config, placements, expand_size, kwargs)
            pictures = {name: kwargs.pop(name) for name in layout.argument_names if name in kwargs}
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, kwargs | pictures

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Prepare one forward of generate(): Hugging Face's arguments, and the coordinates of the tokens in
        it.

        Raises:
            ValueError: if the forward would begin or end inside an image or video.
        """
        cache = name_cache(kwargs)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        coords = model_inputs.pop("linmu_coords", None)
        reads_prompt = is_first_iteration or not kwargs.get("use_cache", True)
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


def coords_between(coords: Tensor, start: int, end: int) -> Tensor:
    """Return coords (B, L, 4) of the positions [start, end): -1 beyond L, where generated text is."""
    for position in (start, end):
        must = "prefill must not be split inside an image or video"
        whole = not cuts_a_block(coords, position)
        hint = "choose another prefill_chunk_size"
        require(whole, "generate", must, f"a split before position {position}", hint)
    return F.pad(coords, (0, 0, 0, max(0, end - coords.shape[1])), value=-1)[:, start:end]
