"""Watching without end: frames a second from pixels, of one stream and of several in turn, and what grows.

A *block* is what one `watch.see` takes. Two frames are one moment, of 64 or 256 tokens. Everything counts
from arrays of pixels on: the processor on the host, the vision tower, the decoder. The teacher watches with
all keys and values, which hold random numbers before the timed block, or with those of the last tokens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ...reference.prompts.qwen_processing import FrameProcessor, LinMUQwen2_5_VLProcessor
from ...reference.student.cache import CACHE_NAME
from ...reference.student.watching import watch
from .cases import Case, values_of
from .graphs import EAGER, run_by
from .kernels import OURS, Setting
from .models import END, IMAGE, MODELS, START, TEACHER, VIDEO, VISION, Pair
from .timing import Timing, busy_seconds, percentile, random

BENCHMARK = "watching"
FRAMES_PER_SECOND = 2.0
PLACES = {START: "<|vision_start|>", END: "<|vision_end|>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
OTHERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TEMPLATE = Path(__file__).parents[2] / "reference" / "demo" / "chat_template.jinja"
CLIPS = 4  # different blocks, seen in turn
WARM = 4  # blocks before the timed ones: compiled, tuned, captured
LEAST = 5  # timed ones
LAST = 32768  # tokens whose keys and values a sliding cache keeps
SEEN = (32768, 262144, 1048576, 2097152)  # tokens before the teacher's block
SEEN_QUICK = (1024,)
SMALL = "small"


@dataclass(frozen=True)
class Stream:
    """What is watched.

    Args:
        tokens: of a moment, a square number.
        frames: of a block.
        count: streams.
        together: in one forward; else one after the other.
    """

    tokens: int
    frames: int
    count: int = 1
    together: bool = False

    @property
    def name(self) -> str:
        """In a table."""
        how = "at once" if self.together else "in turn"
        streams = "1 stream" if self.count == 1 else f"{self.count} streams {how}"
        return f"{streams}, {self.frames} frames a block, {self.tokens} tokens a moment"

    @property
    def block_tokens(self) -> int:
        """Vision tokens of a block of one stream."""
        return self.tokens * self.frames // VISION["temporal_patch_size"]

    def clips(self) -> Iterator[np.ndarray]:
        """Blocks of noise, uint8 (frames, side, side, 3), again and again."""
        side = round(self.tokens**0.5) * VISION["patch_size"] * VISION["spatial_merge_size"]
        numbers = np.random.default_rng(0)
        shape = (self.frames, side, side, 3)
        return itertools.cycle([numbers.integers(0, 256, shape, dtype=np.uint8) for _ in range(CLIPS)])


STREAMS = (
    *(Stream(tokens, frames) for frames in (2, 8) for tokens in (256, 64)),
    *(Stream(tokens, 2, 8, together) for together in (False, True) for tokens in (256, 64)),
)
QUICK_STREAMS = (Stream(4, 2), Stream(4, 2, 2), Stream(4, 2, 2, True))


@dataclass(frozen=True)
class Endless:
    """A run long enough to see what grows.

    Args:
        model: of `MODELS`.
        stream: what is watched.
        frames: in all.
        max_position: where positions are restarted, so that this takes part.
    """

    model: str
    stream: Stream
    frames: int
    max_position: int = 4096


ENDLESS = (
    Endless("qwen2.5-vl-7b", Stream(64, 8), 2_400),
    Endless(SMALL, Stream(4, 64), 100_000),
)
QUICK_ENDLESS = (Endless(SMALL, Stream(4, 64), 640),)


def watching_cases(
    pair: Pair, setting: Setting, quick: bool, priority: Callable[[str, int], int]
) -> Iterator[Case]:
    """All lines: LinMU from graphs and eagerly, the teacher, and long runs."""
    on_gpu = setting.device.type == "cuda"

    def line(method: str, stream: Stream, measure: Callable, late: int = 0) -> Case:
        rank = priority(method, stream.block_tokens) + late
        return Case(BENCHMARK, method, pair.size, stream.name, stream.block_tokens, measure, rank)

    streams = QUICK_STREAMS if quick else STREAMS
    for stream in streams:
        yield line(OURS, stream, partial(measure_watching, pair, OURS, stream, setting))
    first = streams[0]
    if on_gpu:
        yield line(EAGER, first, partial(measure_watching, pair, EAGER, first, setting), 2)
    for tokens in SEEN_QUICK if quick else SEEN:
        name = f"{TEACHER}, {tokens:,} tokens before"
        yield line(name, first, partial(measure_teacher, pair, first, tokens, False, setting), 1)
    tokens = SEEN_QUICK[0] if quick else LAST
    name = f"{TEACHER}, the last {tokens:,} tokens"
    yield line(name, first, partial(measure_teacher, pair, first, tokens, True, setting), 1)
    for run in QUICK_ENDLESS if quick else ENDLESS:
        own = pair if run.model == pair.name else Pair(run.model, None, setting, prepared=False)
        passes = f"{run.frames:,} frames, {run.stream.name}"
        measure = partial(measure_endless, own, run, setting)
        rank = priority(OURS, run.stream.block_tokens) + (1 if own is pair else 3)
        yield Case(BENCHMARK, OURS, own.size, passes, run.stream.block_tokens, measure, rank)


def build_processor() -> LinMUQwen2_5_VLProcessor:
    """A processor for the models of `MODELS`: a token per byte behind the special ones."""
    names = [name for _, name in sorted(PLACES.items())] + list(OTHERS)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate([*names, *letters])}
    bpe = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left"
    )
    sizes = {"patch_size": VISION["patch_size"], "temporal_patch_size": VISION["temporal_patch_size"]}
    sizes |= {"min_pixels": 1, "max_pixels": 2**24}
    images = Qwen2VLImageProcessorPil(**sizes, merge_size=VISION["spatial_merge_size"])
    processor = LinMUQwen2_5_VLProcessor(images, tokenizer, chat_template=TEMPLATE.read_text())
    processor.video_processor = FrameProcessor(**sizes, merge_size=VISION["spatial_merge_size"])
    return processor


def accelerated(method: str, model: nn.Module, setting: Setting):
    """`run_by`; on a CPU, which has no graphs, LinMU runs eagerly."""
    return run_by(method, model) if setting.device.type == "cuda" else nullcontext()


def synchronize(setting: Setting) -> None:
    """Wait for the device."""
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)


def time_blocks(see: Callable[[], object], setting: Setting, most: int = 100) -> tuple[Timing, float]:
    """Seconds of one call until the device is done, and a call's share of many without waiting between."""

    def waited() -> float:
        start = time.perf_counter()
        see()
        synchronize(setting)
        return time.perf_counter() - start

    synchronize(setting)
    once = waited()
    count = min(max(int(4 * setting.seconds / once), LEAST), most)
    times = [waited() for _ in range(count)]
    start = time.perf_counter()
    for _ in range(count):
        see()
    synchronize(setting)
    share = (time.perf_counter() - start) / count
    middle, low, high = (percentile(times, part) for part in (0.5, 0.2, 0.8))
    return Timing(middle, low, high, count), share


def measure_watching(pair: Pair, method: str, stream: Stream, setting: Setting) -> dict[str, Any]:
    """A block of each stream; frames a second of all streams together."""
    model, clips, processor = pair.model(OURS), stream.clips(), build_processor()
    sessions = [watch(model, processor, FRAMES_PER_SECOND) for _ in range(stream.count)]

    def see() -> None:
        if stream.together:
            watch.see_together(sessions, [next(clips) for _ in sessions])
            return
        for session in sessions:
            session.see(next(clips))

    with accelerated(method, model, setting):
        for _ in range(WARM):
            see()
        timing, share = time_blocks(see, setting)
        busy = busy_seconds(see) if setting.device.type == "cuda" else None
        host = host_seconds(sessions[0], next(clips))
    frames = stream.frames * stream.count
    values = values_of(timing, busy=busy, cache_bytes=sum(session.state_bytes for session in sessions))
    values |= {"processor_seconds": host, "seconds_in_a_row": share}
    return values | {
        "frames_per_second": frames / share,
        "tokens_per_second": stream.block_tokens * stream.count / share,
    }


def host_seconds(session: watch, clip: np.ndarray) -> float:
    """What the processor takes for a block, on the host."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        encode(session.processor, clip)
        times.append(time.perf_counter() - start)
    return percentile(times, 0.5)


def encode(processor: Any, clip: np.ndarray) -> dict[str, Any]:
    """A clip as a video between its markers."""
    text = PLACES[START] + PLACES[VIDEO] + PLACES[END]
    given = {"do_sample_frames": False, "add_special_tokens": False, "return_tensors": "pt"}
    metadata = [
        {
            "total_num_frames": len(clip),
            "fps": FRAMES_PER_SECOND,
            "frames_indices": list(range(len(clip))),
        }
    ]
    return processor(text=[text], videos=[clip], video_metadata=metadata, **given)


@torch.no_grad()
def measure_teacher(pair: Pair, stream: Stream, seen: int, slides: bool, setting: Setting) -> dict[str, Any]:
    """A block of one stream after `seen` tokens, whose keys and values are there; with `slides` they make
    room for the block's afterwards, else its own are taken away again for the next.
    """
    model, clips, processor = pair.model(TEACHER), stream.clips(), build_processor()
    text = MODELS[pair.name]["text_config"]
    dim = text["hidden_size"] // text["num_attention_heads"]
    shape, cache = (1, text["num_key_value_heads"], seen, dim), DynamicCache()
    for layer in range(len(model.get_decoder().layers)):
        kept = [random(shape, setting.dtype, setting.device) for _ in range(2)]
        cache.update(*kept, layer)

    def see() -> None:
        inputs = encode(processor, next(clips))
        ids = inputs["input_ids"]
        positions = torch.arange(seen, seen + ids.shape[1]).expand(3, 1, -1)
        names = ("pixel_values_videos", "video_grid_thw")
        given = {"input_ids": ids, "position_ids": positions} | {name: inputs[name] for name in names}
        given = {name: tensor.to(setting.device) for name, tensor in given.items()}
        model(**given, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        for layer in cache.layers:
            part = slice(-seen, None) if slides else slice(seen)
            layer.keys, layer.values = layer.keys[:, :, part], layer.values[:, :, part]

    see()
    timing, share = time_blocks(see, setting, most=20)
    busy = busy_seconds(see) if setting.device.type == "cuda" else None
    per_token = 2 * len(cache.layers) * text["num_key_value_heads"] * dim * setting.dtype.itemsize
    values = values_of(timing, busy=busy, cache_bytes=per_token * seen, seconds_in_a_row=share)
    rate = stream.block_tokens / share
    return values | {"frames_per_second": stream.frames / share, "tokens_per_second": rate}


def measure_endless(pair: Pair, run: Endless, setting: Setting) -> dict[str, Any]:
    """Many blocks in a row: how fast, and by how many bytes anything has grown since the first ones."""
    model, clips, processor = pair.model(OURS), run.stream.clips(), build_processor()
    session = watch(model, processor, FRAMES_PER_SECOND, max_position=run.max_position)
    times: list[float] = []

    def see(blocks: int) -> None:
        for _ in range(blocks):
            start = time.perf_counter()
            session.see(next(clips))
            times.append(time.perf_counter() - start)

    with accelerated(OURS, model, setting):
        see(WARM)
        session.position = run.max_position  # so that a restart is behind us, too
        see(2)
        synchronize(setting)
        before, state = memory(setting), session.state_bytes
        times.clear()
        count, start = -(-run.frames // run.stream.frames), time.perf_counter()
        see(count)
        synchronize(setting)
        seconds = time.perf_counter() - start
    grown = {name: value - before[name] for name, value in memory(setting).items()}
    parts = np.array_split(np.array(times), min(10, count))
    timing = Timing(*(percentile(times, part) for part in (0.5, 0.2, 0.8)), count)
    values = values_of(timing, cache_bytes=session.state_bytes, seconds_in_a_row=seconds / count)
    rates = [run.stream.frames / float(part.mean()) for part in parts]
    return values | {
        "frames": session.frames,
        "frames_per_second": run.stream.frames * count / seconds,
        "frames_per_second_by_tenths": rates,
        "state_growth": session.state_bytes - state,
        "growth": grown,
        "tokens_per_second": run.stream.block_tokens * count / seconds,
    }


def memory(setting: Setting) -> dict[str, int]:
    """Bytes that the process holds: tensors on the GPU, all of it on the host."""
    held = {}
    if setting.device.type == "cuda":
        held["gpu"] = torch.cuda.memory_allocated(setting.device)
    pages = Path("/proc/self/statm")
    if pages.exists():
        held["host"] = int(pages.read_text().split()[1]) * 4096
    return held
