"""A Hugging Face model whose decoder layers hold M-MATE: its construction and forward.

generate() is in `generation.py`.

Put before a family's class:  class LinMUQwen2VL...(LinMUModel, Qwen2VLForConditionalGeneration)

How each layer learns where the vision tokens are: forward lets the family's `PromptLayout` find them, makes
one `VisionLayout` of their coordinates, and passes it to every layer as the keyword `linmu_layout`. In
generate(), where Hugging Face has replaced pixels and grids by embeddings, the coordinates come as
`linmu_coords`. The samples of packed rows are found too, and passed to every layer as `linmu_sequence`; and
within `context_parallel` how the tokens are split over processes, as `linmu_split`.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init
from transformers.utils import logging

from ..checks import require
from ..config import LinMUConfig
from ..layout import VisionLayout
from ..m_mate import MMATE
from ..numerics import accumulation_dtype
from ..prompts.grids import placement_coords
from .backend import Backend, backend_of
from .cache import CACHE_NAME, name_cache
from .generation import StudentGeneration, has_m_rope, rope_index
from .mixer import as_self_attn
from .packed_rows import SampleSpans, started_anew, take_samples
from .quantised import refuse_not_finite, refuse_packed, summary
from .saved_folder import whole_weights, write_card
from .split_forward import Context
from .unconverted_attention import ATTENTION

logger = logging.get_logger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FLOAT32_PARAMETERS = ("flex_ma.A_log", "flex_ma.D", "flex_ma.dt_proj", "flex_ma.scan_gate_proj", "mix_proj")
VERSION = 2  # of `config.linmu`
OPTIONS_BEFORE = {1: {"text_window": 0}}  # what a version says nothing of, as its students have it
NO_PICTURES = (
    "A student got placeholder tokens of images or videos, and neither pictures nor linmu_coords: "
    "it takes them as text."
)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a teacher or student, PEFT's wrapping included; each has a `self_attn`."""
    return model.get_decoder().layers


def mixers(model: nn.Module) -> dict[int, MMATE]:
    """Return the M-MATE blocks that stand directly at `self_attn`, by layer index."""
    blocks = {index: layer.self_attn for index, layer in enumerate(decoder_layers(model))}
    return {index: block for index, block in blocks.items() if isinstance(block, MMATE)}


def with_vision_layout(forward: Callable) -> Callable:
    """Make of a family's forward one that tells the layers where the vision tokens are.

    It takes two arguments more: `linmu_coords`, (B, L, 4) int64 as in `VisionLayout`, for those who pass
    `inputs_embeds`; by default the coordinates come from `input_ids` and the grids. And `linmu_sequence`, (B,
    L) int64, the samples of packed rows, which may be padded; by default `packed_rows` finds them.
    """
    base = inspect.signature(forward)

    @wraps(forward)
    def forward_with_layout(
        self, *args, linmu_coords: Tensor | None = None, linmu_sequence: Tensor | None = None, **kwargs
    ):
        kwargs = base.bind_partial(self, *args, **kwargs).arguments
        kwargs |= kwargs.pop("kwargs", {})
        del kwargs["self"]
        name_cache(kwargs)
        sequence = self.take_samples(linmu_sequence, kwargs)
        kwargs["linmu_layout"] = self.vision_layout(linmu_coords, kwargs, sequence)
        if sequence is not None:
            kwargs["linmu_sequence"] = sequence
            kwargs["linmu_spans"] = SampleSpans(sequence, kwargs["attention_mask"])
        split = None
        if self.context is not None:
            split = self.context.split(kwargs, sequence, self.linmu_backend.operators)
        if split is None:
            return forward(self, **kwargs)
        outputs = forward(self, **kwargs, linmu_split=split)
        return split.finish(self, outputs, outputs.get(CACHE_NAME))

    names = ("linmu_coords", "linmu_sequence")
    own = (inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names)
    *named, wildcard = base.parameters.values()
    forward_with_layout.__signature__ = base.replace(parameters=[*named, *own, wildcard])
    return forward_with_layout


class LinMUModel(StudentGeneration):
    """What all families share.

    Args:
        config: of the model; its `linmu` says which layers are converted, and with what options.
        linmu_backend: who computes the mixers, a `Backend` or its name; None = as LINMU_BACKEND says.
    Attributes:
        linmu_backend: the `Backend`.
        context: how prompts are split over processes, within `context_parallel`; None = they are not.
    Raises:
        ValueError: if the configuration has no `linmu`, or one of a newer version.
    """

    # Half precision leaves the strict ones alone; quantisers the others, by names of modules or weights.
    _keep_in_fp32_modules = (*FLOAT32_PARAMETERS, *(f"{name}.weight" for name in FLOAT32_PARAMETERS))
    _keep_in_fp32_modules_strict = FLOAT32_PARAMETERS
    context: Context | None = None

    def __init__(self, config, linmu_backend: Backend | str | None = None) -> None:
        check_settings(config.linmu)
        super().__init__(config)
        self.linmu_backend = backend_of(linmu_backend)
        adapter_class = as_self_attn(self.linmu_backend.MMATE)
        layers = decoder_layers(self)
        for index in config.linmu["layers"]:
            sizes = mixer_config(config, layers[index].self_attn, saved_options(config.linmu))
            layers[index].self_attn = with_float32_parameters(adapter_class(sizes, index))
        super().set_attn_implementation(attention_by_part(config))
        self.post_init()
        if self.linmu_backend.prepare is not None:
            self.linmu_backend.prepare(self)
        for module in self.modules():  # only attention's projections could be split by heads: M-MATE is whole
            if getattr(module, "_tp_plan", None):
                plan = module._tp_plan.items()
                module._tp_plan = {name: kind for name, kind in plan if "self_attn" not in name.split(".")}

    def _replicate_for_data_parallel(self):
        refuse_replicas()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Start the parameters that no checkpoint brought, the mixers' own included."""
        super().initialize_weights()
        for mixer in mixers(self).values():
            for name, value in mixer.initial_values().items():
                init.copy_(mixer.get_parameter(name), value)  # leaves loaded tensors alone

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Set how the vision tower attends; the decoder stays with ours, whose mask M-MATE reads.

        Raises:
            ValueError: if another one is asked for the decoder.
        """
        decoder = attention_by_part(self.config)
        given = attn_implementation
        if isinstance(decoder, dict) and isinstance(given, str):
            given = dict.fromkeys(self.config.sub_configs, given) | decoder
        own = given if isinstance(decoder, str) else {name: given.get(name, ATTENTION) for name in decoder}
        must, hint = f"the decoder must keep {ATTENTION!r}", "name the other parts alone"
        require(own == decoder, "set_attn_implementation", must, attn_implementation, hint)
        super().set_attn_implementation(given, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Open a student's folder, as any Hugging Face model is opened.

        Raises:
            ValueError: if the folder's tensors are damaged, not exactly this model's, or cannot be quantised.
        """
        kwargs.setdefault("use_safetensors", True)
        kwargs["ignore_mismatched_sizes"] = True  # reported below, with missing keys
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
        if getattr(model, "hf_quantizer", None) is not None:
            refuse_not_finite(model)
            logger.warning(summary(model))
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save a folder that is ready for the Hub: safetensors, configurations and a model card.

        Raises:
            ValueError: for 4-bit weights that a forward on a CPU has packed anew, and for a student with its
                teacher attached, whose folder could not be opened.
        """
        refuse_packed(self)
        taught = [i for i, layer in enumerate(decoder_layers(self)) if hasattr(layer.self_attn, "attention")]
        must, hint = "student must be saved without its teacher", "detach_teacher(student) first"
        require(not taught, "save_pretrained", must, f"attention in layers {taught}", hint)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_card(self, save_directory)

    def take_samples(self, sequence: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the samples of packed rows, `packed_rows.take_samples`; None = one a row.

        Positions start anew in each, if the caller has none; M-RoPE's also if there are pictures and only the
        text's positions are given, which tell of the samples and no more.
        """
        sequence = take_samples(type(self).__name__, sequence, kwargs)
        positions = kwargs.get("position_ids")
        if sequence is None:
            return None
        if has_m_rope(self, kwargs) and (positions is None or positions.ndim == 2):
            positions = rope_index(self, kwargs)[0]  # (3, B, L)
        elif positions is None:
            positions = torch.arange(sequence.shape[1], device=sequence.device).expand(sequence.shape)
        else:
            return sequence
        kwargs["position_ids"] = started_anew(positions, sequence, kwargs["attention_mask"].bool())
        return sequence

    def vision_layout(
        self, coords: Tensor | None, kwargs: dict[str, Any], sequence: Tensor | None = None
    ) -> VisionLayout | None:
        """Return the layout of one forward's tokens; None = all text.

        Args:
            coords: (B, L, 4) int64 if the caller knows them.
            kwargs: the forward's arguments.
            sequence: (B, L) int64, the samples of packed rows; None = one a row.
        Raises:
            ValueError: if `coords` are missing for `inputs_embeds`, or tokens and grids do not fit.
        Warns:
            UserWarning: once, if `coords` are missing for the `inputs_embeds` of a text decoder's student.
        """
        input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if self.prompt_layout is None and coords is None:
            is_prompt = embeds is not None and not decodes_one_token(embeds, kwargs.get(CACHE_NAME))
            if is_prompt and not torch.compiler.is_compiling():
                warn_taken_as_text(type(self).__name__)
            return None
        tokens = input_ids if embeds is None else embeds
        if torch.compiler.is_exporting():
            must, hint = "a student's inputs must be text", "where pictures are depends on values"
            is_text = coords is None and not self.has_vision(kwargs)
            require(is_text, "torch.export", must, "pictures", hint)
            return None
        if coords is None:
            where, must = type(self).__name__, "linmu_coords must come with inputs_embeds"
            hint = "-1 throughout for text; coords are (B, L, 4) [segment, t, y, x]"
            require(input_ids is not None, where, must, None, hint)
            coords = self.picture_coords(input_ids, kwargs)
        if coords is None:
            return None
        layout = self.linmu_backend.VisionLayout(coords.to(tokens.device), sequence)
        return layout if layout.has_vision else None

    def picture_coords(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Return (B, L, 4) of a forward's pictures; None = text, whatever the ids.

        A placeholder may have been sampled. So one without a picture is an error only if token types say that
        it stands for one; without types it is said.
        """
        is_prompt = input_ids.shape[1] > 1
        if not self.has_vision(kwargs) and not (is_prompt and kwargs.get("mm_token_type_ids") is not None):
            if (
                is_prompt
                and not torch.compiler.is_compiling()
                and bool(self.placeholder_mask(input_ids).any())
            ):
                logger.warning_once(NO_PICTURES)
            return None
        placements = self.placements(input_ids, kwargs)
        return placement_coords(placements, input_ids.shape, input_ids.device) if placements else None

    def placeholder_mask(self, input_ids: Tensor) -> Tensor:
        """Say where placeholders of images and videos are: (B, L) int64 -> (B, L) bool, nowhere for text."""
        return self.placeholder_types(input_ids) > 0


def refuse_replicas() -> None:
    """What `nn.DataParallel` meets where it asks for a replica: those of one process run in threads, and
    would share what the layers of a forward share.

    Raises:
        ValueError: always.
    """
    must, hint = "a student must have a process for each GPU", "start it by torchrun, with DDP or FSDP2"
    require(False, "nn.DataParallel", must, "one process for several", hint)


def decodes_one_token(embeds: Tensor, past: Cache | None) -> bool:
    """Say whether embeddings (B, L, D) are one token after others: a generated one, which is text."""
    return embeds.shape[1] == 1 and past is not None and past.get_seq_length() > 0


@cache
def warn_taken_as_text(where: str) -> None:
    """Say once for each class that embeddings are taken as text: vision among them would be misread."""
    must = "linmu_coords must come with inputs_embeds, got None, and every token is taken as text"
    hint = "pass (B, L, 4) [segment, t, y, x], -1 throughout for text; a student for vision is made by"
    option = "convert(teacher, {'text_only': False})"
    warnings.warn(f"{where}: {must}; {hint} {option}", UserWarning, stacklevel=2)


def with_float32_parameters(mixer: MMATE) -> MMATE:
    """Bring the parameters that half precision would harm to at least float32, in place."""
    for name, parameter in mixer.named_parameters():
        if name.startswith(FLOAT32_PARAMETERS):
            parameter.data = parameter.data.to(accumulation_dtype(parameter.dtype))
    return mixer


def check_settings(settings: dict[str, Any] | None) -> None:
    """Raise ValueError unless `settings`, a configuration's `linmu`, is one that this code can build."""
    where, hint = "LinMUModel", "turn a vanilla model into a student with convert()"
    require(isinstance(settings, dict), where, "config.linmu must hold a student's settings", settings, hint)
    version = settings.get("version")
    must = f"config.linmu['version'] must be among {[*OPTIONS_BEFORE, VERSION]}"
    require(version in (*OPTIONS_BEFORE, VERSION), where, must, version, "upgrade linmu")


def saved_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a configuration's `linmu`, with those that its version knew nothing of."""
    return OPTIONS_BEFORE.get(settings["version"], {}) | settings["options"]


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
