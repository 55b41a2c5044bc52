"""Genuine small checkpoints of every family, with their real processors; no download.

Unlike in `tiny_checkpoint.py`, pictures are pictures: what the models get is what the family's own processor
makes of text and images. Videos, which need torchvision there, are written by hand as that processor would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from linmu.reference.prompts.other_processors import (
    LinMUIdefics3Processor,
    LinMUInternVLProcessor,
    LinMULlavaOnevisionProcessor,
    LinMUQwen3VLProcessor,
)
from linmu.reference.prompts.qwen_processing import LinMUQwen2_5_VLProcessor, LinMUQwen2VLProcessor

from ..training.video_parts import video_part
from .tiny_checkpoint import shake

WIDTH, PATCH = 32, 4
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "initializer_range": 0.3,
}


def byte_tokenizer(special: tuple[str, ...], named: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte and these special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    names = dict.fromkeys(("<pad>", "<end>", *special, *(named or {}).values()))
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        extra_special_tokens=named or {},
    )


@dataclass
class Tiny:
    """A teacher, its processor, and how its prompts are written.

    Args:
        image: what stands for an image in a prompt.
        video: frames -> the inputs of a prompt with that video between two words; None = no videos.
        sizes: height and width of the pictures, by name.
        tile_axis: the axis of pixels along which a later turn's are appended.
    """

    name: str
    teacher: PreTrainedModel
    processor: Any
    image: str = ""
    video: Callable[[int], dict[str, Tensor]] | None = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    tile_axis: int = 0

    def inputs(self, *rows: str, seed: int = 0, given: Image.Image | None = None) -> dict[str, Tensor]:
        """Return the model's inputs for prompts in which `{name}` stands for an image of `sizes[name]`.

        The images are noise that depends on `seed`, or `given` in their place.
        """
        texts, images = [], []
        for row in rows:
            names = [part.split("}")[0] for part in row.split("{")[1:]]
            texts.append(row.format(**dict.fromkeys(names, self.image)))
            images.append([given or self.picture(name, seed) for name in names])
        if not any(images):
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            return dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
        return dict(self.processor(text=texts, images=images, padding=True, return_tensors="pt"))

    def picture(self, name: str, seed: int) -> Image.Image:
        """Return noise of this picture's size."""
        height, width = self.sizes[name]
        generator = np.random.default_rng([seed, height, width])
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Append a later turn's pixels, or what comes with them; fewer tiles per image are filled up."""
        axis = self.tile_axis if parts[0].ndim > 3 else 0
        if axis == 0 and parts[0].ndim > 4:
            most = max(part.shape[1] for part in parts)
            parts = [torch.cat([p, p.new_zeros(len(p), most - p.shape[1], *p.shape[2:])], 1) for p in parts]
        return torch.cat(parts, dim=axis)


def finished(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Set a teacher up for tests: every bias in play, and no placeholder is ever drawn."""
    shake(teacher.eval(), ("bias", "image_newline"))
    settings = teacher.generation_config
    settings.pad_token_id = tokenizer.pad_token_id
    settings.eos_token_id = settings.bos_token_id = settings.max_length = None
    settings.suppress_tokens = list(range(256, teacher.config.get_text_config().vocab_size))
    return teacher


QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.3,
}
NARROW = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": WIDTH}
DEEP = NARROW | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 36}
WINDOWED = NARROW | {"window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2}
WIDE = {"head_dim": 12}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
QWEN = {  # configuration, model, processor, the vision tower's sizes, the decoder's
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        LinMUQwen2VLProcessor,
        {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2},
        {},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        LinMUQwen2_5_VLProcessor,
        WINDOWED,
        {},
    ),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, LinMUQwen3VLProcessor, DEEP, WIDE),
    "qwen3_vl_moe": (
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        LinMUQwen3VLProcessor,
        DEEP,
        EXPERTS,
    ),
}


def qwen_vl(name: str) -> Tiny:
    """Qwen's: biases and M-RoPE; Qwen3's: q/k norms, heads wider than width / heads, DeepStack, experts."""
    config_class, model_class, processor_class, vision, text = QWEN[name]
    tokenizer = byte_tokenizer(("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"))
    token = tokenizer.convert_tokens_to_ids
    newer = name.startswith("qwen3")
    section = [2, 2, 2] if text.get("head_dim") == 12 else [2, 1, 1]
    rope = (
        TEXT["rope_parameters"] | {"mrope_section": section} | ({"mrope_interleaved": True} if newer else {})
    )
    config = config_class(
        text_config=TEXT | text | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=QWEN_VISION | vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(0)
    teacher = finished(model_class(config), tokenizer)
    pixels = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, min_pixels=64, max_pixels=4096)

    def video(frames: int) -> dict[str, Tensor]:
        """2·3 tokens per frame: one run, or in Qwen3-VL a run per frame, each after its time."""
        start, end = "<|vision_start|>", "<|vision_end|>"
        runs = "".join(f"<{i}.0 seconds>{start}{'<|video_pad|>' * 6}{end}" for i in range(frames))
        text = f"see {runs if newer else start + '<|video_pad|>' * 6 * frames + end} end"
        inputs = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        generator = torch.Generator().manual_seed(frames)
        inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == token("<|video_pad|>")).int()
        inputs["pixel_values_videos"] = torch.randn(frames * 24, 3 * 2 * PATCH**2, generator=generator)
        return inputs | {"video_grid_thw": torch.tensor([[frames, 4, 6]])}

    image, sizes = "<|vision_start|><|image_pad|><|vision_end|>", {"wide": (16, 32), "tall": (40, 16)}
    parts = video_part("Qwen3VL") if newer else {}
    return Tiny(name, teacher, processor_class(pixels, tokenizer, **parts), image, video, sizes)


def llava_onevision() -> Tiny:
    """LLaVA-OneVision: 3·3 tokens a tile."""
    tokenizer = byte_tokenizer((), {"image_token": "<image>", "video_token": "<video>"})
    side = 12
    pinpoints = [[side * y, side * x] for y in (1, 2, 3) for x in (1, 2, 3)]
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP, "image_size": side}
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)).to_dict(),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_5",
    )
    torch.manual_seed(0)
    teacher = finished(LlavaOnevisionForConditionalGeneration(config), tokenizer)
    pixels = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    processor = LinMULlavaOnevisionProcessor(
        pixels,
        tokenizer,
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_5",
        **video_part("LlavaOnevision"),
    )

    def video(frames: int) -> dict[str, Tensor]:
        """2·2 tokens a frame after pooling, and a newline at the end."""
        text = f"see {'<video>' * (4 * frames + 1)} end"
        inputs = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        generator = torch.Generator().manual_seed(frames)
        return inputs | {"pixel_values_videos": torch.randn(1, frames, 3, side, side, generator=generator)}

    sizes = {"wide": (16, 36), "tall": (36, 12), "large": (36, 36)}
    return Tiny("llava_onevision", teacher, processor, "<image>", video, sizes)


def internvl() -> Tiny:
    """InternVL: 3·3 tokens a tile."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer((), named)
    side = 24
    vision = SIGLIP | {"image_size": [side, side], "patch_size": [PATCH, PATCH], "num_channels": 3}
    config = InternVLConfig(
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)).to_dict(),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=9,
        downsample_ratio=0.5,
    )
    torch.manual_seed(0)
    teacher = finished(InternVLForConditionalGeneration(config), tokenizer)
    pixels = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = LinMUInternVLProcessor(pixels, tokenizer, image_seq_length=9, **video_part("InternVL"))

    def video(frames: int) -> dict[str, Tensor]:
        """A line per frame."""
        lines = (f"Frame{i + 1}: <img>{'<IMG_CONTEXT>' * 9}</img>" for i in range(frames))
        text = "see " + "\n".join(lines) + " end"
        inputs = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        generator = torch.Generator().manual_seed(frames)
        return inputs | {"pixel_values": torch.randn(frames, 3, side, side, generator=generator)}

    sizes = {"wide": (24, 48), "tall": (48, 24), "small": (24, 24)}
    return Tiny("internvl", teacher, processor, "<IMG_CONTEXT>", video, sizes)


def idefics3(smol: bool = False) -> Tiny:
    """Idefics3 and SmolVLM: 2·2 tokens a tile, tiles numbered in the prompt."""
    markers = tuple(f"<row_{y + 1}_col_{x + 1}>" for y in range(6) for x in range(6))
    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *markers)
    tokenizer = byte_tokenizer(special)
    side = 16
    text = LlamaConfig(**TEXT, vocab_size=len(tokenizer), attention_bias=smol, pad_token_id=256)
    config = (SmolVLMConfig if smol else Idefics3Config)(
        text_config=text.to_dict(),
        vision_config=SIGLIP | {"image_size": side},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=256,
    )
    torch.manual_seed(0)
    model_class = SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration
    teacher = finished(model_class(config), tokenizer)
    image_class = SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil
    pixels = image_class(size={"longest_edge": 48}, max_image_size={"longest_edge": side})
    processor = LinMUIdefics3Processor(pixels, tokenizer, image_seq_len=4)
    sizes = {"wide": (32, 48), "tall": (48, 16), "small": (16, 16)}
    return Tiny("smolvlm" if smol else "idefics3", teacher, processor, "<image>", None, sizes, tile_axis=1)


def text_decoder(llama: bool = False) -> Tiny:
    """Qwen2 and Llama: no vision."""
    tokenizer = byte_tokenizer(())
    config_class, model_class = (LlamaConfig, LlamaForCausalLM) if llama else (Qwen2Config, Qwen2ForCausalLM)
    torch.manual_seed(0)
    teacher = finished(model_class(config_class(**TEXT, vocab_size=len(tokenizer))), tokenizer)
    return Tiny("llama" if llama else "qwen2", teacher, tokenizer)


BUILDERS: dict[str, Callable[[], Tiny]] = {
    **{name: partial(qwen_vl, name) for name in QWEN},
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3(smol=True),
    "qwen2": text_decoder,
    "llama": lambda: text_decoder(llama=True),
}
