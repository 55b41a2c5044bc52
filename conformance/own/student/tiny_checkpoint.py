"""Genuine small Qwen2-VL and Qwen2.5-VL checkpoints, and prompts with images and videos for them; no
download.

Weights are random and large enough that every part of the model shows in the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from linmu.reference import VisionLayout
from linmu.reference.student.backend import Backend

PAD, END, VISION_START, VISION_END, IMAGE, VIDEO = range(6)
FIRST_WORD, VOCABULARY = 6, 64
PATCH, TEMPORAL_PATCH, MERGE = 2, 2, 2
PATCH_VALUES = 3 * TEMPORAL_PATCH * PATCH * PATCH
WIDTH = 32

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
VISION = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL_PATCH,
    "spatial_merge_size": MERGE,
    "initializer_range": 0.3,
}
VISION_2_5 = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "window_size": 16,
    "fullatt_block_indexes": [0],
    "out_hidden_size": WIDTH,
    "tokens_per_second": 2,
}
VISION_2 = {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
FAMILIES = ("qwen2_5_vl", "qwen2_vl")


def build_teacher(family: str = "qwen2_5_vl", *, tied: bool = False, **text: Any) -> PreTrainedModel:
    """Return a random teacher in eval mode, float32; `text` overrides sizes of its decoder."""
    if family == "qwen2_5_vl":
        config_class, model_class = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        vision = VISION | VISION_2_5
    else:
        config_class, model_class = Qwen2VLConfig, Qwen2VLForConditionalGeneration
        vision = VISION | VISION_2
    config = config_class(text_config=TEXT | text, vision_config=vision, tie_word_embeddings=tied, **TOKENS)
    torch.manual_seed(0)
    teacher = model_class(config).eval()
    shake(teacher, ("bias",))
    teacher.generation_config.pad_token_id = PAD
    teacher.generation_config.eos_token_id = None  # tests count steps
    teacher.generation_config.max_length = None
    teacher.generation_config.suppress_tokens = list(range(FIRST_WORD))  # a drawn placeholder has no picture
    return teacher


@torch.no_grad()
def shake(model: nn.Module, names: Sequence[str] = ("",), scale: float = 0.2, seed: int = 1) -> nn.Module:
    """Add noise to the parameters whose name ends in one of `names`, so that none is at a neutral start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(names)):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (scale * noise).to(parameter.dtype)
    return model


NEW_PARAMETERS = (
    "dt_proj.weight",
    "dt_proj.bias",
    "scan_gate_proj.weight",
    "scan_gate_proj.bias",
    "conv_weight",
    "conv_bias",
    "norm_weight",
    "flex_ma.D",
    "A_log",
    "mix_proj.weight",
    "mix_proj.bias",
)


def shake_mixers(student: nn.Module) -> nn.Module:
    """Move every parameter that attention does not have away from its neutral start."""
    return shake(student, NEW_PARAMETERS)


def student_backend(backend: Any) -> Backend:
    """Return the classes of a backend under test by which a student is computed."""
    layout = getattr(backend.module, "VisionLayout", VisionLayout)
    return Backend(backend.name, backend.MMATE, layout)


def words(count: int, seed: int) -> list[int]:
    """Return that many random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator).tolist()


def picture(modality: int, grid_thw: tuple[int, int, int]) -> dict[str, Any]:
    """Return one image (modality IMAGE, T = 1) or video (VIDEO) of a grid in tokens, to be put into a
    prompt."""
    return {"modality": modality, "grid_thw": grid_thw}


def prompt(*parts: list[int] | dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return the model inputs of one row made of text tokens and pictures."""
    ids: list[int] = []
    pixels: dict[int, list[Tensor]] = {IMAGE: [], VIDEO: []}
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        if isinstance(part, list):
            ids += part
            continue
        modality, (frames, height, width) = part["modality"], part["grid_thw"]
        ids += [VISION_START, *[modality] * (frames * height * width), VISION_END]
        patches = frames * height * width * MERGE**2
        pixels[modality].append(torch.randn(patches, PATCH_VALUES, generator=generator))
        grids[modality].append([frames, height * MERGE, width * MERGE])
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs["mm_token_type_ids"] = ((input_ids == IMAGE) + 2 * (input_ids == VIDEO)).int()
    if grids[IMAGE]:
        inputs["pixel_values"] = torch.cat(pixels[IMAGE])
        inputs["image_grid_thw"] = torch.tensor(grids[IMAGE])
    if grids[VIDEO]:
        inputs["pixel_values_videos"] = torch.cat(pixels[VIDEO])
        inputs["video_grid_thw"] = torch.tensor(grids[VIDEO])
    return inputs


def batch(rows: Sequence[dict[str, Tensor]], side: str = "left") -> dict[str, Tensor]:
    """Pad single rows to one batch, on the left or on the right."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    joined: dict[str, list[Tensor]] = {}
    for row in rows:
        missing = longest - row["input_ids"].shape[1]
        for name, value in row.items():
            if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                value = nn.functional.pad(value, (missing, 0) if side == "left" else (0, missing), value=0)
            joined.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in joined.items()}


def every_kind(side: str = "left") -> dict[str, Tensor]:
    """A batch of an image, a text and a video row."""
    image = prompt(words(4, 0), picture(IMAGE, (1, 3, 2)), words(3, 1), seed=1)
    video = prompt(words(2, 2), picture(VIDEO, (2, 2, 2)), words(5, 3), seed=2)
    return batch([image, prompt(words(6, 4)), video], side)


def in_fresh_memory(model: nn.Module) -> nn.Module:
    """The same model, its tensors copied to where torch puts new ones. What is opened lies where the file has
    it, and some CPUs add up products in another order there.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """One forward, (B, L, vocabulary)."""
    return model(**inputs, use_cache=False).logits
