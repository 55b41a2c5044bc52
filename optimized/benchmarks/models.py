"""Teacher and student of the same random weights, and the time to first token of both.

The teacher's attention is torch's fastest on this device, found by trying. In both models the MLPs take a
long prompt in slices, which changes no result and lets longer prompts fit, and on a GPU torch.compile fuses
norms and MLPs, which Hugging Face computes operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ..student import convert
from .cases import Case, clear_memory, values_of
from .kernels import OURS, Setting
from .problems import Prompt, prompt
from .timing import VERY_LONG, random, time_calls, wall_and_busy

TEACHER = "teacher"
METHODS = (OURS, TEACHER)
MLP_SLICE = 2**14  # tokens
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
TRIED_LENGTH = 2**13

VISION = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    # config.json of Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2.5-vl-7b": {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": VISION
        | {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    },
    # a size for a CPU
    "small": {
        "text_config": {
            "vocab_size": 1024,
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        "vision_config": VISION
        | {
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [0],
            "tokens_per_second": 2,
        },
    },
}
START, END, IMAGE, VIDEO, FIRST_WORD = 0, 1, 2, 3, 4  # ids of the special tokens, in every size


def build_teacher(name: str, layers: int | None, setting: Setting) -> nn.Module:
    """A Qwen2.5-VL with random weights, drawn on the device; `layers` shortens its decoder."""
    sizes = MODELS[name]["text_config"] | ({"num_hidden_layers": layers} if layers else {})
    config = Qwen2_5_VLConfig(
        text_config=sizes | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        vision_config=MODELS[name]["vision_config"],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            return Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


@dataclass
class Pair:
    """Both models over one copy of the shared weights, built when first asked for; `prepared` as the module
    says, or as Hugging Face makes them."""

    name: str
    layers: int | None
    setting: Setting
    prepared: bool = True
    _models: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """As in the tables."""
        return self.name + (f", {self.layers} layers" if self.layers else "")

    def model(self, method: str) -> nn.Module:
        """The student or the teacher."""
        if not self._models:
            teacher = build_teacher(self.name, self.layers, self.setting)
            self._models = {TEACHER: teacher, OURS: convert(teacher).eval()}
            for model in self._models.values() if self.prepared else ():
                if self.setting.device.type == "cuda":
                    compile_norms_and_mlps(model, self.setting)
                slice_mlps(model)
        return self._models[method]

    def forget(self) -> None:
        """Free the memory; the next `model` builds them again."""
        self._models = {}
        clear_memory()

    @cached_property
    def attention(self) -> SDPBackend | None:
        """The fastest causal attention of torch for the teacher's heads; None = torch chooses."""
        return fastest_attention(self.heads, TRIED_LENGTH, TRIED_LENGTH, self.setting)

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, G, head dim."""
        text = MODELS[self.name]["text_config"]
        heads = text["num_attention_heads"]
        return heads, text["num_key_value_heads"], text["hidden_size"] // heads


@torch.no_grad()
def compile_norms_and_mlps(model: nn.Module, setting: Setting) -> None:
    """Let torch.compile fuse what teacher and student have in common, and run it once: no timed call shall
    compile. One graph serves all layers and, but for a single token, all lengths.
    """
    decoder = model.get_decoder()
    for layer in decoder.layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.forward = torch.compile(part.forward, dynamic=True)
    decoder.norm.forward = torch.compile(decoder.norm.forward, dynamic=True)
    width = model.get_input_embeddings().weight.shape[1]
    for length in (TRIED_LENGTH, 1):
        hidden = random((1, length, width), setting.dtype, setting.device)
        decoder.layers[0].mlp(decoder.norm(hidden))


def slice_mlps(model: nn.Module) -> None:
    """Let every MLP of the decoder take `MLP_SLICE` tokens at a time: its inner width is its memory."""
    for layer in model.get_decoder().layers:
        layer.mlp.forward = partial(in_slices, layer.mlp.forward)


def in_slices(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`forward` over (B, L, D), slice by slice."""
    if hidden.shape[1] <= MLP_SLICE:
        return forward(hidden)
    return torch.cat([forward(part) for part in hidden.split(MLP_SLICE, 1)], 1)


def fastest_attention(
    heads: tuple[int, int, int], queries: int, keys: int, setting: Setting, batch: int = 1
) -> SDPBackend | None:
    """Try torch's attention kernels at these sizes; None on a CPU, which has one."""
    if setting.device.type != "cuda":
        return None
    query_heads, groups, dim = heads
    q = random((batch, query_heads, queries, dim), setting.dtype, setting.device)
    k, v = (random((batch, groups, keys, dim), setting.dtype, setting.device) for _ in range(2))
    found: dict[SDPBackend, float] = {}
    for backend in BACKENDS:

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

        try:
            with sdpa_kernel(backend), torch.no_grad():
                found[backend] = time_calls([attend], setting.device, seconds=0.02).seconds
        except Exception:  # not available for these sizes
            continue
    return min(found, key=found.get) if found else None


def attention_of(choice: SDPBackend | None) -> AbstractContextManager:
    """Within, torch's attention tries this kernel first."""
    if choice is None:
        return nullcontext()
    rest = [backend for backend in (*BACKENDS, SDPBackend.MATH) if backend != choice]
    return sdpa_kernel([choice, *rest], set_priority=True)


def first_token_cases(
    pair: Pair, lengths: Sequence[int], setting: Setting, priority: Callable[[str, int], int]
) -> Iterator[Case]:
    """Time to first token of the decoder, from embeddings to the next token's logits and the cache."""
    for method in METHODS:
        for length in lengths:
            yield Case(
                "ttft",
                method,
                pair.size,
                "decoder",
                length,
                partial(measure_first_token, pair, method, length, setting),
                priority(method, length),
                growth=2.0 if method == TEACHER else 1.0,
                once_from=VERY_LONG,
            )


def tower_cases(
    pair: Pair, lengths: Sequence[int], setting: Setting, priority: Callable[[str, int], int]
) -> Iterator[Case]:
    """The vision tower alone, and the same as above from pixels: the tower comes before the decoder."""
    places = {"vision tower": measure_tower, "vision tower and decoder": measure_from_pixels}
    for method in METHODS:
        for length in lengths:
            for place, measure in places.items():
                run = partial(measure, pair, method, length, setting)
                key = "ttft", method, pair.size, place, length, run, priority(method, length)
                yield Case(*key, growth=2.0, once_from=VERY_LONG)


def measure_first_token(pair: Pair, method: str, length: int, setting: Setting) -> dict[str, Any]:
    """Prefill from embeddings; the values of one line."""
    model = pair.model(method)
    return timed_prefill(pair, model, embedded_prompt(model, method, length, setting), setting)


def embedded_prompt(model: nn.Module, method: str, length: int, setting: Setting) -> dict[str, Tensor]:
    """Random embeddings of one row, their positions, and coordinates for a student."""
    where, width = prompt(length), model.get_input_embeddings().weight.shape[1]
    embeds = random((1, length, width), setting.dtype, setting.device)
    inputs = {"inputs_embeds": embeds, "position_ids": where.positions(setting.device)}
    return inputs | ({"linmu_coords": where.coords(setting.device)} if method == OURS else {})


def measure_from_pixels(pair: Pair, method: str, length: int, setting: Setting) -> dict[str, Any]:
    """Prefill from token ids and a video's pixels; the values of one line."""
    model = pair.model(method)
    return timed_prefill(pair, model, video_inputs(model, prompt(length), setting), setting)


def measure_tower(pair: Pair, method: str, length: int, setting: Setting) -> dict[str, Any]:
    """A video's pixels to what stands for its tokens; hastened in the student, stock in the teacher."""
    model = pair.model(method)
    inputs = video_inputs(model, prompt(length), setting)

    @torch.no_grad()
    def encode() -> None:
        model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])

    timing, busy = wall_and_busy(encode, setting.device, seconds=setting.seconds, most=10)
    return values_of(timing, tokens_per_second=length / timing.seconds, busy=busy) | {"memory": timing.peak}


def timed_prefill(pair: Pair, model: nn.Module, inputs: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Time one forward that fills a cache; memory is that of weights, inputs and pass together."""
    sizes: dict[str, int] = {}

    def prefill() -> None:
        with torch.no_grad():
            output = model(**inputs, use_cache=True, logits_to_keep=1)
        sizes["cache_bytes"] = cache_bytes(output.past_key_values)

    with attention_of(pair.attention):
        timing = time_calls([prefill], setting.device, seconds=setting.seconds, most=20, once_from=VERY_LONG)
    length = inputs["position_ids" if "position_ids" in inputs else "input_ids"].shape[-1]
    more = {"tokens_per_second": length / timing.seconds, "attention": name_of(pair.attention)}
    return values_of(timing, **sizes, **more) | {"memory": timing.peak}


def name_of(choice: SDPBackend | None) -> str:
    """An attention kernel's name, in words."""
    return "torch's default" if choice is None else choice.name.lower().replace("_", " ")


def cache_bytes(cache: Any) -> int:
    """Bytes that decoding keeps."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        tensors = state.tensors if state is not None else (layer.keys, layer.values)
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def video_inputs(model: nn.Module, where: Prompt, setting: Setting) -> dict[str, Tensor]:
    """Token ids with one video among random words, its pixels and its grid."""
    vision = model.config.vision_config
    merge, device = vision.spatial_merge_size, setting.device
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(FIRST_WORD, words, (1, where.length), device=device)
    ids[:, where.inside] = VIDEO
    ids[:, where.start - 1], ids[:, where.inside.stop] = START, END
    frames, height, width = where.grid
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": ((ids == VIDEO) * 2).int(),
        "pixel_values_videos": random((where.vision * merge**2, values), setting.dtype, device),
        "video_grid_thw": torch.tensor([[frames, height * merge, width * merge]], device=device),
    }
