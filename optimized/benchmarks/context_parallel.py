"""One prompt on several GPUs: prefill and a training step on each alone, then split over all of them.

    torchrun --nproc_per_node 2 -m linmu.optimized.benchmarks.context_parallel
    torchrun ... -m linmu.optimized.benchmarks.context_parallel --prefill 262144 --layers 4 --step 0
    torchrun ... -m linmu.optimized.benchmarks.context_parallel --quick --prefill 4096      on CPUs, with gloo

A decoder with the 7B's widths and random weights; MLPs take 16,384 tokens at a time, as in the other
benchmarks. Every call runs once before it is timed; the better of two counts, on the slower rank. What is
computed in both ways is compared. Rank 0 writes `results.json` and a table into --output, after every line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import Qwen2Config, Qwen2ForCausalLM

from ...reference.checks import require
from ...reference.student.cache import CACHE_NAME
from ...reference.student.split_forward import context_parallel
from ..benchmark import commit, device_name, version
from ..student import convert
from .cases import clear_memory
from .models import MODELS, slice_mlps

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
QUICK_WIDTHS = dict(zip(WIDTHS, (64, 96, 4, 2), strict=True))
VOCABULARY = 1024
TEXT = 32  # tokens in front of the video; behind it as many, and what is left of a frame
REPEATS = 2
WHERE = "benchmark of context parallel"
KINDS = ("video", "text")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run what the command line asks for, on every rank; returns the lines."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if "LOCAL_RANK" not in os.environ:
        parser.error(f"{WHERE}: torchrun must start it, got one process; torchrun --nproc_per_node 2 -m ...")
    if not given.quick and not torch.cuda.is_available():
        parser.error(f"{WHERE}: a CUDA GPU a process must be there, got none; add --quick for CPUs")
    if given.quick:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    try:
        return measure(given, device)
    finally:
        dist.destroy_process_group()


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="narrow layers in float32 on CPUs, with gloo")
    add(
        "--prefill", type=int, nargs="*", default=[262144, 1048576], help="tokens of the prefills; none: skip"
    )
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what the prefills' prompts are made of")
    add("--layers", type=int, default=28, help="decoder layers of the prefills")
    add("--step", type=int, default=65536, help="tokens of the training step; 0: none")
    add("--step_layers", type=int, default=4, help="decoder layers of the training step")
    add("--output", default="context-parallel", help="folder")
    return parser


def measure(given: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """All lines, within a process group."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    table = Table(Path(given.output), environment(device), dist.get_rank() == 0)
    if given.prefill:
        student = build(given.quick, given.layers, torch.float32 if given.quick else torch.bfloat16, device)
        for tokens in given.prefill:
            for kind in given.kinds:
                prefill(student, mesh, kind, tokens, table)
        del student
    if given.step:
        student = build(given.quick, given.step_layers, torch.float32, device)
        step(student, mesh, given.step, not given.quick, table)
    return table.lines


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    names = ("torch", "triton", "transformers")
    return {
        "device": device_name(device),
        "ranks": dist.get_world_size(),
        "backend": dist.get_backend(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    } | {name: version(name) for name in names}


def build(quick: bool, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A student with random weights, the same on every rank."""
    text = MODELS["qwen2.5-vl-7b"]["text_config"]
    widths = QUICK_WIDTHS if quick else {name: text[name] for name in WIDTHS}
    config = Qwen2Config(**widths, num_hidden_layers=layers, vocab_size=VOCABULARY)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            teacher = Qwen2ForCausalLM(config)
            student = convert(teacher, {"text_only": False, "text_window": 8 if quick else 128})
    finally:
        torch.set_default_dtype(before)
    slice_mlps(student)
    return student


def prompt(kind: str, tokens: int, frame: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Random ids (1, L), text alone or one video of frames (Y, X) with text around it."""
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (1, tokens), device=device)
    coords = torch.full((1, tokens, 4), -1, dtype=torch.int64, device=device)
    if kind == "video":
        frames = (tokens - 2 * TEXT) // math.prod(frame)
        least = 2 * TEXT + math.prod(frame)
        require(frames > 0, WHERE, f"a video's prompt must have at least {least} tokens", tokens)
        cells = torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, frames, *frame)))
        coords[0, TEXT : TEXT + len(cells)] = cells
    return {"input_ids": ids, "linmu_coords": coords}


def frame_of(student: nn.Module) -> tuple[int, int]:
    """Tokens of a frame, (Y, X)."""
    return (4, 4) if student.config.hidden_size == QUICK_WIDTHS["hidden_size"] else (16, 16)


@torch.no_grad()
def prefill(student: nn.Module, mesh: DeviceMesh, kind: str, tokens: int, table: Table) -> None:
    """One prompt's forward to the next token's logits and the cache, whole and split."""
    inputs = prompt(kind, tokens, frame_of(student), student.device)
    run = partial(student, **inputs, use_cache=True, logits_to_keep=1)
    key = {"part": "prefill", "kind": kind, "tokens": tokens, "layers": student.config.num_hidden_layers}
    one, whole = timed(run, student.device)
    logits, states = whole.logits, scan_states(whole)
    del whole  # its other states are memory
    table.keep(key | {"ranks": 1} | one)
    with context_parallel(student, mesh):
        split, output = timed(run, student.device)
    off = {
        "logits_off": relative(output.logits, logits),
        "states_off": max(map(relative, scan_states(output), states)),
    }
    table.keep(key | {"ranks": mesh.size()} | split | {"speedup": one["seconds"] / split["seconds"]} | off)


def step(student: nn.Module, mesh: DeviceMesh, tokens: int, low: bool, table: Table) -> None:
    """The loss of all of a video's tokens and its gradients, whole and split; `low`: bfloat16 autocast."""
    inputs = prompt("video", tokens, frame_of(student), student.device)
    key = {"part": "step", "kind": "video", "tokens": tokens, "layers": student.config.num_hidden_layers}

    def run() -> Tensor:
        student.zero_grad()
        with torch.autocast(student.device.type, torch.bfloat16, enabled=low):
            loss = student(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        return loss.detach()

    one, loss = timed(run, student.device)
    table.keep(key | {"ranks": 1} | one)
    wanted = {name: each.grad.cpu() for name, each in student.named_parameters() if each.grad is not None}
    with context_parallel(student, mesh):
        split, share = timed(run, student.device)
    dist.all_reduce(share)
    off = []
    for name, parameter in student.named_parameters():
        if name in wanted:
            dist.all_reduce(parameter.grad)
            off.append(relative(parameter.grad, wanted[name].to(student.device)))
    more = {"speedup": one["seconds"] / split["seconds"], "loss_off": relative(share, loss)}
    table.keep(key | {"ranks": mesh.size()} | split | more | {"gradients_off": max(off)})


def timed(work: Callable[[], Any], device: torch.device) -> tuple[dict[str, Any], Any]:
    """Seconds of the slowest rank and bytes of this rank's peak (None on a CPU); what `work` returns."""
    result, best, on_gpu = work(), math.inf, device.type == "cuda"
    for _ in range(REPEATS):
        del result
        clear_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    slowest = torch.tensor(best, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return {"seconds": slowest.item(), "peak": peak}, result


def scan_states(output: Any) -> list[Tensor]:
    """The forward scan's state of each layer, (B, H, N, P)."""
    return [layer.state.scan for layer in output[CACHE_NAME].layers]


def relative(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, as a part of the norm of what is wanted."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


class Table:
    """The lines of a run; rank 0 prints and writes them.

    Args:
        folder: where; made if it is missing.
        environment: what the numbers belong to, by name.
        writes: is this rank 0?
    """

    def __init__(self, folder: Path, environment: dict[str, Any], writes: bool) -> None:
        self.folder, self.environment, self.writes = folder, environment, writes
        self.lines: list[dict[str, Any]] = []

    def keep(self, line: dict[str, Any]) -> None:
        """Take one line, and write all so far."""
        self.lines.append(line)
        if not self.writes:
            return
        print(json.dumps(line), flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {"environment": self.environment, "lines": self.lines}
        (self.folder / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
        (self.folder / "README.md").write_text(self.markdown() + "\n")

    def markdown(self) -> str:
        """The lines, for people."""
        head = [f"- {name}: {value}" for name, value in self.environment.items()]
        names = (
            "what",
            "tokens",
            "layers",
            "ranks",
            "ms",
            "peak GiB a rank",
            "times one rank's speed",
            "off",
        )
        rows = [names, ["---"] * len(names), *map(cells, self.lines)]
        body = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join(["# One prompt on several GPUs", "", *head, "", *body])


def cells(line: dict[str, Any]) -> list[str]:
    """A line in Markdown; `off`: from what one rank computes, as a part of its size."""
    peak, speedup = line["peak"], line.get("speedup")
    off = [
        f"{name.removesuffix('_off')} {value:.1e}" for name, value in line.items() if name.endswith("_off")
    ]
    return [
        f"{line['part']}, {line['kind']}",
        *(f"{line[name]:,}" for name in ("tokens", "layers", "ranks")),
        f"{line['seconds'] * 1e3:,.1f}",
        "" if peak is None else f"{peak / 2**30:.1f}",
        "" if speedup is None else f"{speedup:.2f}",
        ", ".join(off),
    ]


if __name__ == "__main__":
    main()
