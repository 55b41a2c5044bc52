"""Measure LinMU against its peers and its teacher; decide by it whether to switch.

    python -m linmu.optimized.benchmark --quick              on a CPU, in two minutes
    python -m linmu.optimized.benchmark                      on a GPU, everything
    python -m linmu.optimized.benchmark --budget 200         the same, the most telling lines first, then stop
    python -m linmu.optimized.benchmark --only model,decode --lengths 32768,131072
    python -m linmu.optimized.benchmark --only graphs,model --lengths graphs=512,1024 model=32768

Writes Markdown tables, JSON and plots into --output, after every line. Peers take part if they are installed:
fla (`pip install fla-core`), mamba_ssm, Bi-Mamba2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .benchmarks import decoding, graphs, kernels, models, training, watching
from .benchmarks.cases import Case, measure_all
from .benchmarks.counts import Sizes
from .benchmarks.problems import SHORTEST
from .benchmarks.report import Report
from .benchmarks.timing import Ceilings, measure_ceilings
from .engine import get_engine

PARTS = ("kernels", "windows", "model", "graphs", "decode", "training", "text", "watch")
K = 1024
TEXT_MODEL = "smollm2-135m"
SIZES = "28x4x128,16x4x64"
QUICK_SIZES = "8x2x64"
LENGTHS = {
    "kernels": [4 * K, 16 * K, 64 * K, 256 * K, 1024 * K],
    "windows": [4 * K, 16 * K, 64 * K, 256 * K, 1024 * K],
    "model": [2 * K, 8 * K, 32 * K, 128 * K, 256 * K, 512 * K],
    "graphs": [512, 1 * K, 2 * K, 3000, 4 * K, 8 * K],
    "decode": [8 * K, 32 * K, 128 * K],
    "training": [4 * K, 16 * K],
    "text": [1 * K, 4 * K, 16 * K],
    "watch": [],
}
QUICK_LENGTHS = {
    "kernels": [512, 1024, 2048, 4096, 8192, 16 * K],
    "windows": [512, 1024, 2048, 4096, 8192, 16 * K],
    "model": [512, 2048, 8192],
    "graphs": [],
    "decode": [512, 4096, 32 * K],
    "training": [SHORTEST],
    "text": [],
    "watch": [],
}
LONG = 256 * K  # tokens from which on a line waits until the shorter ones are there
ONE_PART = 1000  # more than any priority within a part
QUICK_BUDGET = 110.0
QUICK_BOTH = 2048  # tokens up to which --quick times a backward pass
PLOTTING = 8.0  # seconds of a budget kept for the plots
VERSIONS = ("torch", "triton", "transformers", "fla-core", "mamba-ssm")


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    quick: bool
    parts: tuple[str, ...]
    in_turn: bool
    lengths: dict[str, list[int]]
    sizes: list[Sizes]
    layers: int | None
    peers: bool
    budget: float | None
    output: Path
    device: torch.device
    commit: str

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU; a CPU computes it by converting, so float32 there."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def model(self) -> str:
        """The model whose sizes are used."""
        return "small" if self.quick else "qwen2.5-vl-7b"


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run what the command line asks for; returns what was written."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.render:
        report = Report.read(Path(given.render))
        report.write()
        report.plot()
        return report
    options = checked(parser, given)
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmark: stopped"))  # what is measured stays written
    setting = kernels.Setting(
        options.device,
        options.dtype,
        measure_ceilings(options.device, options.dtype),
        seconds=0.15 if options.quick else 0.2,
    )
    said = shlex.join(sys.argv[1:] if arguments is None else arguments)
    report = Report(options.output, environment(options, setting.ceilings, said))
    spent = time.perf_counter() - started
    budget = None if options.budget is None else options.budget - spent - PLOTTING
    pair, plain = (
        models.Pair(options.model, options.layers, setting, prepared) for prepared in (True, False)
    )

    def prepare(case: Case) -> None:
        """Leave all of the memory to what is measured."""
        as_they_are = (*graphs.BENCHMARKS, watching.BENCHMARK)
        if case.benchmark not in as_they_are:
            plain.forget()
        if case.benchmark in ("scan", "windows", "training", *as_they_are):
            pair.forget()

    try:
        measure_all(cases_of(options, setting, pair, plain), report.keep, budget, prepare)
    finally:
        report.environment["load after"] = load()
        report.write()
        report.plot()
    print(report.markdown())
    print(f"\nwritten to {options.output}", file=sys.stderr)
    return report


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        "python -m linmu.optimized.benchmark",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes, on the CPU, in two minutes")
    add("--only", help=f"parts to run, one after the other, among {','.join(PARTS)}; default: all")
    add(
        "--lengths",
        nargs="+",
        help="tokens, like 4096,65536, or by part, like model=4096",
    )
    add("--sizes", help=f"heads x groups x head dim of the operators; default {SIZES}")
    add("--layers", type=int, help="decoder layers of the model; default: all")
    add("--without-peers", action="store_true", help="measure LinMU, from graphs alone, and its teacher")
    add(
        "--budget",
        type=float,
        help=f"seconds after which no further line is begun; --quick: {QUICK_BUDGET:.0f}",
    )
    add("--output", help="folder; default optimized/results/<device>")
    add("--commit", help="what to write down as the commit where there is no git")
    add("--render", metavar="FOLDER", help="write tables and plots of an earlier run again, and stop")
    return parser


def checked(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    """The flags as `Options`; what is wrong with them ends the program."""
    if not given.quick and not torch.cuda.is_available():
        parser.error("benchmark: a CUDA GPU must be there, got none; add --quick for the CPU")
    parts = tuple(given.only.split(",")) if given.only else PARTS
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"benchmark: --only must be among {','.join(PARTS)}, got {','.join(unknown)}")
    try:
        lengths = lengths_of(given.lengths or [], QUICK_LENGTHS if given.quick else LENGTHS)
        text = given.sizes or (QUICK_SIZES if given.quick else SIZES)
        sizes = [Sizes(*(int(part) for part in size.split("x"))) for size in text.split(",")]
    except (ValueError, TypeError):
        parser.error("benchmark: --lengths must be like 4096,65536 or model=4096, and --sizes like 28x4x128")
    shortest = min(length for part in parts for length in lengths[part] or [SHORTEST])
    if shortest < SHORTEST:
        parser.error(f"benchmark: --lengths must be at least {SHORTEST}, got {shortest}")
    device = torch.device("cpu") if given.quick else torch.device("cuda", torch.cuda.current_device())
    folder = Path("optimized/results") / slug(device_name(device))
    return Options(
        given.quick,
        parts,
        bool(given.only),
        lengths,
        sizes,
        given.layers,
        not given.without_peers,
        given.budget or (QUICK_BUDGET if given.quick else None),
        Path(given.output) if given.output else folder,
        device,
        given.commit or commit(),
    )


def lengths_of(given: Sequence[str], defaults: dict[str, list[int]]) -> dict[str, list[int]]:
    """Tokens by part: "4096,65536" for all, "model=4096" for one. ValueError for anything else."""
    found = dict(defaults)
    for item in given:
        part, equals, numbers = item.rpartition("=")
        if equals and part not in PARTS:
            raise ValueError(part)
        asked = sorted({int(number) for number in numbers.split(",")})
        found |= dict.fromkeys([part] if equals else PARTS, asked)
    return found


def cases_of(
    options: Options, setting: kernels.Setting, pair: models.Pair, plain: models.Pair
) -> Iterator[Case]:
    """All lines of a run; where parts were named, one part after the other."""
    groups = [(part,) for part in options.parts] if options.in_turn else [options.parts]
    for place, parts in enumerate(groups):
        for case in cases_of_parts(replace(options, parts=parts), setting, pair, plain):
            if options.peers or case.method != graphs.EAGER:
                yield replace(case, priority=case.priority + place * ONE_PART)


def cases_of_parts(
    options: Options, setting: kernels.Setting, pair: models.Pair, plain: models.Pair
) -> Iterator[Case]:
    """Lines with models prepared for long prompts, and as users have them. The order is by priority: first
    what shows each part at ordinary lengths, then backward passes, long prompts and peers that take long to
    compile.
    """
    lengths = options.lengths
    for place, sizes in enumerate(options.sizes):
        for passes in (kernels.FORWARD, kernels.BOTH):
            for benchmark, part in (("scan", "kernels"), ("windows", "windows")):
                if part in options.parts:
                    yield from operator_lines(
                        benchmark, options, sizes, lengths[part], passes, setting, 10 * place
                    )
    if "model" in options.parts:
        wait = [length for length in lengths["model"] if length <= 32 * K]
        yield from models.first_token_cases(pair, lengths["model"], setting, later(1, LONG, 6))
        if not options.quick:
            yield from models.tower_cases(pair, wait[-1:], setting, later(7, LONG, 7))
    if "graphs" in options.parts and not options.quick:
        yield from graphs.short_prompt_cases(plain, lengths["graphs"], setting, later(-1, LONG, 6))
        yield from graphs.generate_cases(plain, setting, later(-1, LONG, 6))
    if "watch" in options.parts:
        yield from watching.watching_cases(plain, setting, options.quick, later(9, LONG, 9))
    if "decode" in options.parts:
        yield from decoding.decode_cases(pair, lengths["decode"], setting, later(2, LONG, 6))
    if "training" in options.parts:
        yield from training.training_cases(pair, lengths["training"], setting, eager_last)
    if "text" in options.parts and not options.quick:
        rows = [each for each in training.ROWS if each.tokens in lengths["text"]]
        yield from training.text_training_cases(TEXT_MODEL, rows, setting, eager_last)


def operator_lines(
    benchmark: str,
    options: Options,
    sizes: Sizes,
    lengths: Sequence[int],
    passes: str,
    setting: kernels.Setting,
    start: int,
) -> Iterator[Case]:
    """The lines of one operator at one size; peers that compile for long come after the models."""
    base = start + (3 if passes == kernels.BOTH else 0)
    if options.quick:
        methods = kernels.QUICK_SCAN if benchmark == "scan" else kernels.QUICK_WINDOWS
        lengths = [length for length in lengths if passes == kernels.FORWARD or length <= QUICK_BOTH]
    else:
        methods = kernels.SCAN if benchmark == "scan" else kernels.WINDOWS
    if not options.peers:
        methods = methods[:1]

    def priority(method: str, length: int) -> int:
        if "flex" in method:
            return start + 8
        if method in ("fla", "mamba_ssm"):
            return start + 4
        return start + 5 if length > LONG else base

    yield from kernels.operator_cases(benchmark, methods, sizes, lengths, passes, setting, priority)


def later(soon: int, long: int, late: int):
    """A priority: `soon`, but `late` from `long` tokens on."""
    return lambda method, length: late if length >= long else soon


def eager_last(method: str, length: int) -> int:
    """The priority of training: steps as they are come after those from graphs."""
    return 11 if method == graphs.EAGER else 9


def environment(options: Options, ceilings: Ceilings, said: str) -> dict[str, Any]:
    """What the numbers belong to."""
    found = {
        "device": device_name(options.device),
        "command": f"python -m linmu.optimized.benchmark {said}".strip(),
        "commit": options.commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "engine of the operators": get_engine(options.device),
        "numbers": str(options.dtype).removeprefix("torch."),
        "bandwidth": f"{ceilings.bandwidth / 1e9:,.1f} GB/s, a large copy, bytes read and written",
        "rate": f"{ceilings.rate / 1e12:.4g} TFLOP/s, a large matrix product",
        "python": platform.python_version(),
    }
    found |= {name: version(name) for name in VERSIONS}
    if options.device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
    else:
        found |= {
            "cores": str(os.cpu_count()),
            "threads": str(torch.get_num_threads()),
            "load before": load(),
        }
    return found


def load() -> str:
    """How busy the machine's cores are."""
    return f"{os.getloadavg()[0]:.1f} processes over the last minute"


def version(name: str) -> str:
    """A package's version, or that it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def slug(name: str) -> str:
    """A folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of this checkout, marked if files have changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


if __name__ == "__main__":
    main()
