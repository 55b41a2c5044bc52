"""A Hugging Face model whose decoder layers hold M-MATE: its construction, forward and generate().

Put before a family's class:  class LinMUQwen2VL...(LinMUModel, Qwen2VLForConditionalGeneration)

Where the vision tokens are travels like this: forward lets the family's `Vision` find them, makes one
`VisionLayout` of their coordinates and passes it to every layer as the keyword `linmu_layout`. generate()
lets it find them before Hugging Face encodes the images, which takes the grids away, and hands coordinates
(B, L, 4) on as `linmu_coords`.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers import initialization as init

from ..checks import require
from ..config import LinMUConfig
from ..layout import VisionLayout
from ..m_mate import MMATE
from ..prompts.grids import cuts_a_block, placement_coords
from ..prompts.layouts import Vision
from .cache import CACHE_NAME, name_cache
from .mixer import as_self_attn, backend_name, current_mixer
from .saved_folder import whole_weights, write_card
from .unconverted_attention import ATTENTION

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FLOAT32_PARAMETERS = ("flex_ma.A_log", "flex_ma.D", "flex_ma.dt_proj", "flex_ma.scan_gate_proj", "mix_proj")
VERSION = 1


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a teacher or student, PEFT's wrapping included; each has a `self_attn`."""
    return model.get_decoder().layers


def mixers(model: nn.Module) -> dict[int, MMATE]:
    """Return the M-MATE blocks that stand directly at `self_attn`, by layer index."""
    blocks = {index: layer.self_attn for index, layer in enumerate(decoder_layers(model))}
    return {index: block for index, block in blocks.items() if isinstance(block, MMATE)}


def with_vision_layout(forward: Callable) -> Callable:
    """Make of a family's forward one that tells the layers where the vision tokens are.

    It takes one argument more: `linmu_coords`, (B, L, 4) int64 as in `VisionLayout`, for those who pass
    `inputs_embeds`; by default the coordinates come from `input_ids` and the grids.
    """
    base = inspect.signature(forward)

    @wraps(forward)
    def forward_with_layout(self, *args, linmu_coords: Tensor | None = None, **kwargs):
        kwargs = base.bind_partial(self, *args, **kwargs).arguments
        kwargs |= kwargs.pop("kwargs", {})
        del kwargs["self"]
        name_cache(kwargs)
        kwargs["linmu_layout"] = self.vision_layout(linmu_coords, kwargs)
        return forward(self, **kwargs)

    own = inspect.Parameter("linmu_coords", inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, wildcard = base.parameters.values()
    forward_with_layout.__signature__ = base.replace(parameters=[*named, own, wildcard])
    return forward_with_layout


class LinMUModel:
    """What all families share. The configuration's `linmu` says which layers are converted, and with what
    options.

    Attributes:
        vision: how the family's prompts show images and videos; None = a text decoder.
        linmu_backend: the package that computes the mixers, as "linmu.reference".
    Raises:
        ValueError: if the configuration has no `linmu`, or one of a newer version.
    """

    _keep_in_fp32_modules_strict = FLOAT32_PARAMETERS
    vision: Vision | None = None
    _is_stateful = True  # a recurrent state cannot be rolled back: no assisted decoding

    def __init__(self, config) -> None:
        check_settings(config.linmu)
        super().__init__(config)
        mixer_class = current_mixer()
        self.linmu_backend = backend_name(mixer_class)
        layers = decoder_layers(self)
        for index in config.linmu["layers"]:
            sizes = mixer_config(config, layers[index].self_attn, config.linmu["options"])
            layers[index].self_attn = as_self_attn(mixer_class)(sizes, index)
        self.set_attn_implementation(attention_by_part(config))
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Start the parameters that no checkpoint brought, the mixers' own included."""
        super().initialize_weights()
        for mixer in mixers(self).values():
            for name, value in mixer.initial_values().items():
                init.copy_(mixer.get_parameter(name), value)  # leaves loaded tensors alone

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Open a student's folder, as any Hugging Face model is opened.

        Raises:
            ValueError: if the folder's tensors are damaged, or not exactly this model's.
        """
        kwargs.setdefault("use_safetensors", True)
        kwargs["ignore_mismatched_sizes"] = True  # they are told below, as missing ones are
        with whole_weights(f"{cls.__name__}.from_pretrained"):
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(map(str, info.get(kind) or ()))
            listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            where, must = (
                f"{cls.__name__}.from_pretrained",
                "the folder must hold exactly this student's tensors",
            )
            require(not names, where, must, f"{kind.replace('_', ' ')}: {listing}", "save the student again")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save a folder that is ready for the Hub: safetensors, configurations and a model card."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_card(self, save_directory)

    def vision_layout(self, coords: Tensor | None, kwargs: dict[str, Any]) -> VisionLayout | None:
        """Return the layout of one forward's tokens; None = all text.

        Args:
            coords: (B, L, 4) int64 if the caller knows them.
            kwargs: the forward's arguments.
        Raises:
            ValueError: if `coords` are missing for `inputs_embeds`, or tokens and grids do not fit.
        """
        if self.vision is None and coords is None:
            return None
        input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = input_ids if embeds is None else embeds
        if coords is None:
            where, must = type(self).__name__, "linmu_coords must come with inputs_embeds"
            hint = "-1 throughout for text; coords are (B, L, 4) [segment, t, y, x]"
            require(input_ids is not None, where, must, None, hint)
            if self.is_decoding_step(tokens, kwargs):
                return None
            placements = self.vision.placements(self.config, input_ids, kwargs)
            if not placements:
                return None
            coords = placement_coords(placements, tokens.shape[:2], tokens.device)
        coords = coords.to(tokens.device)
        return self.layout_class(coords) if bool((coords >= 0).any()) else None

    @property
    def layout_class(self) -> type[VisionLayout]:
        """The backend's own layout, where it has one: it need not be checked again."""
        return getattr(sys.modules.get(self.linmu_backend), "VisionLayout", VisionLayout)

    def placeholder_mask(self, input_ids: Tensor) -> Tensor:
        """Say where placeholders of images and videos are: (B, L) int64 -> (B, L) bool, nowhere for text."""
        modalities = () if self.vision is None else self.vision.arguments
        token_ids = [getattr(self.config, f"{modality}_token_id") for modality in modalities]
        return torch.isin(input_ids, input_ids.new_tensor(token_ids))

    def is_decoding_step(self, tokens: Tensor, kwargs: dict[str, Any]) -> bool:
        """Say whether this forward is one generated token: text, whatever its id."""
        cache = kwargs.get(CACHE_NAME)
        continues = cache is not None and cache.get_seq_length() > 0
        return tokens.shape[1] == 1 and continues and not self.vision.given(kwargs)

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
        if input_ids is not None and self.vision is not None and self.vision.given(kwargs):
            placements = self.vision.placements(self.config, input_ids, kwargs)
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
        self.vision.drop_cached(self.config, placements, past, kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat rows for beams and samples; older transformers would deal the pictures out one by one."""
        pictures = {}
        if (
            expand_size > 1
            and input_ids is not None
            and self.vision is not None
            and self.vision.given(kwargs)
        ):
            placements = self.vision.placements(self.config, input_ids, kwargs)
            self.vision.repeat_rows(self.config, placements, expand_size, kwargs)
            pictures = {name: kwargs.pop(name) for name in self.vision.names if name in kwargs}
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
        if not reads_prompt and self.vision is not None:  # some transformers keep passing the prompt's grids
            return {name: value for name, value in model_inputs.items() if name not in self.vision.names}
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
        encodes_first = encodes_first or self.vision is None
        require(
            generation_config.prefill_chunk_size is None or encodes_first,
            "generate",
            "prefill_chunk_size needs a transformers that encodes images before the prefill",
            generation_config.prefill_chunk_size,
            "upgrade transformers, or prefill through forward",
        )


def check_settings(settings: dict[str, Any] | None) -> None:
    """Raise ValueError unless `settings`, a configuration's `linmu`, is one that this code can build."""
    where, hint = "LinMUModel", "turn a vanilla model into a student with convert()"
    require(isinstance(settings, dict), where, "config.linmu must hold a student's settings", settings, hint)
    version = settings.get("version")
    must = f"config.linmu['version'] must be {VERSION}"
    require(version == VERSION, where, must, version, "upgrade linmu")


def attention_by_part(config) -> dict[str, str] | str:
    """Return what `set_attn_implementation` takes to give the decoder, and nothing else, our attention."""
    text = config.get_text_config(decoder=True)
    parts = [name for name in config.sub_configs if getattr(config, name, None) is text]
    return {parts[0]: ATTENTION} if parts else ATTENTION


def mixer_config(config, attention: nn.Module, options: dict[str, Any]) -> LinMUConfig:
    """Return the sizes of an attention layer, from itself and its model's configuration, with these options.

    Raises:
        ValueError: if it is not grouped-query attention with q, k, v and output projections, or its softmax
            is not scaled by the root of the head dim: M-MATE would not start from what it computes.
    """
    text = config.get_text_config(decoder=True)
    missing = [name for name in PROJECTIONS if not hasattr(attention, name)]
    must = f"attention must have {', '.join(PROJECTIONS)}"
    require(not missing, "mixer_config", must, f"{type(attention).__name__} without {missing}")
    heads = text.num_attention_heads
    head_dim = attention.q_proj.out_features // heads
    scaling = getattr(attention, "scaling", head_dim**-0.5)
    is_plain = math.isclose(scaling, head_dim**-0.5, rel_tol=1e-6)
    require(is_plain, "mixer_config", "attention must be scaled by head_dim ** -0.5", scaling)
    return LinMUConfig(
        width=attention.q_proj.in_features,
        heads=heads,
        groups=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        qkv_bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
        qk_norm=getattr(attention, "q_norm", None) is not None,
        norm_eps=text.rms_norm_eps,
        **LinMUConfig.check_options(options),
    )


def coords_between(coords: Tensor, start: int, end: int) -> Tensor:
    """Return coords (B, L, 4) of the positions [start, end): -1 beyond L, where generated text is."""
    for position in (start, end):
        must = "prefill must not be split inside an image or video"
        whole = not cuts_a_block(coords, position)
        hint = "choose another prefill_chunk_size"
        require(whole, "generate", must, f"a split before position {position}", hint)
    return F.pad(coords, (0, 0, 0, max(0, end - coords.shape[1])), value=-1)[:, start:end]
