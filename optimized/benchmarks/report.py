"""The folder that a run leaves: `results.json`, `README.md` with the tables, a plot per benchmark.

JSON and tables are written after every line, plots at the end, so that a run cut short has lost nothing;
plots can be drawn again from the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .peers import PEERS
from .results import OURS, Line, crossover, growth_exponent, measured, panels, with_ratios
from .window_peers import FLEX_LIMIT

TITLES = {
    "scan": "Bidirectional scan",
    "windows": "Window attention",
    "ttft": "Time to first token",
    "decode": "Decoding",
    "short": "Time to first token of short prompts",
    "generate": "generate()",
    "watching": "Watching without end",
    "training": "Training step",
}
WITHOUT_CURVES = ("training", "watching")  # whose lines differ in more than the length
DEFINITIONS = {
    "scan": (
        "One call of `bidirectional_scan`, or one and its gradients. FLOPs: a scan in chunks of 64 "
        "tokens whose two directions share one product of C and B; bytes: every input and output "
        "once; backward counts twice the forward's FLOPs. The same counts stand for every method, "
        "causal attention excepted, which does another job. The prompt is one video of 80 % of the "
        "tokens, in one piece, so that a peer's reverse direction is a slice."
    ),
    "windows": (
        "One call of `window_attention`, or one and its gradients, over whole windows of 4 × 8 × 8 "
        "tokens, 80 % of the prompt. What depends on the layout alone (the plan of the windows, order of "
        "the tokens, block masks) is not timed."
    ),
    "ttft": (
        "One forward from embeddings, or from pixels, to the next token's logits and the cache; "
        "random weights. Memory is the peak of weights, inputs and pass. LinMU's time contains "
        "finding the scan order and the windows. The MLPs of both models take the prompt in slices of"
        " 16,384 tokens; on a GPU, torch.compile fuses norms and MLPs of both. What takes 15 s or more is"
        " run once."
    ),
    "decode": (
        "Chains of 8 steps of one token after a prompt of that length, replayed from a CUDA graph "
        "where there is a GPU; the time is that of a chain. Caches hold random numbers. The teacher "
        "reads exactly the keys and values it may see, without a mask. The weights of both models are"
        " in memory at once; on a GPU, torch.compile fuses norms and MLPs of both. The largest batch is"
        " what 85 % of the free memory holds; the ratio compares tokens per second."
    ),
    "short": (
        "As above, from embeddings. The time is the wall's, from the call until the GPU is done; *busy* is"
        " the sum of the times of all kernels in a profile of one call. LinMU runs from CUDA graphs "
        "(`optimized.accelerate`), its layout made eagerly and counted; the teacher eagerly, and its whole "
        "forward from one graph of exactly that prompt. Nothing is compiled by torch, in neither model."
    ),
    "generate": (
        "One greedy token of `generate()` after a prompt of that length with a video's pixels: the median of"
        " the times between two tokens. generate() waits for each before it launches the next, from graphs"
        " for the one before. Busy as above, the difference of 34 tokens and 2 over 32; the teacher's cache"
        " is Hugging Face's own."
    ),
    "watching": (
        "One `watch.see` of a block of frames, from arrays of pixels on: processor, vision tower, decoder. "
        "Two frames are one moment; tokens are those of a block's pictures. The time is the wall's, of one "
        "block of each stream until the GPU is done; frames/s are those of all streams, of blocks in a row. "
        "Busy as above. LinMU runs from CUDA graphs on a GPU (`optimized.accelerate`); the teacher as Hugging"
        " Face has it, after so many tokens, whose keys and values are random numbers: all of them, or the "
        "last. What grew counts from the first blocks to the last: bytes of the state, of all tensors on the "
        "GPU, of the process on the host."
    ),
    "training": (
        "One optimizer step: forward, backward, clipping, AdamW; on one prompt with its pixels, layers "
        "recomputed, or on rows of text, padded by up to a sixteenth or packed with up to five samples each, "
        "which count as full. On a GPU LinMU's losses and gradients come from one CUDA graph a step, as in "
        "`distill.py`; eager is without. Wall and busy as above. Memory is the peak of everything, from "
        "graphs what is reserved for it."
    ),
}
METHOD = (
    "Times are medians; the spread is the distance between the 20th and 80th percentiles over the "
    "median. Everything ran once before it was timed. *Of the floor* is the larger of bytes over the "
    "bandwidth and FLOPs over the rate above, both measured in the same run, over the time. *LinMU is"
    " faster* is a method's time over LinMU's: below 1 the other one wins. Causal attention does "
    "another job, the one that the scan stands in for. Every operator's result, and gradient, was "
    "compared with the torch engine in float32 before it was timed."
)


class Report:
    """Keeps the lines of a run and writes them.

    Args:
        folder: where; made if it is missing.
        environment: what the numbers were measured on, by name.
    """

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.folder, self.environment, self.lines = folder, environment, []
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report of an earlier run."""
        kept = json.loads((folder / "results.json").read_text())
        report = cls(folder, kept["environment"])
        report.lines = kept["lines"]
        return report

    def keep(self, line: Line) -> None:
        """Take one line and write everything so far."""
        self.lines.append(line)
        self.write()

    def write(self) -> None:
        """`results.json` and the tables."""
        lines = with_ratios(self.lines)
        kept = {"environment": self.environment, "lines": lines}
        (self.folder / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
        (self.folder / "README.md").write_text(self.markdown() + "\n")

    def of(self, benchmark: str) -> list[Line]:
        """The lines of one benchmark, with ratios, by size, passes, length."""
        lines = [line for line in with_ratios(self.lines) if line["benchmark"] == benchmark]
        return sorted(lines, key=lambda line: (line["size"], line["passes"], line["length"]))

    @property
    def benchmarks(self) -> list[str]:
        """Those that have lines, in the order of the titles."""
        return [name for name in TITLES if any(line["benchmark"] == name for line in self.lines)]

    def markdown(self) -> str:
        """Everything, for people."""
        parts = [f"# Benchmarks: {self.environment['device']}", self.origin(), METHOD]
        for name in self.benchmarks:
            lines = self.of(name)
            parts += [f"## {TITLES[name]}", DEFINITIONS[name]]
            if measured(lines):
                parts += [table(name, lines)]
                if name not in WITHOUT_CURVES:
                    parts += [f"![{TITLES[name]}]({name}.png)"]
            parts += [bullets(growth(lines) + crossovers(lines))] if name not in WITHOUT_CURVES else []
            parts += [bullets(left_out(lines))]
        if {"scan", "windows"} & set(self.benchmarks):
            parts += ["## Limits of the peers", bullets([*(peer.limits for peer in PEERS), FLEX_LIMIT])]
        return "\n\n".join(part for part in parts if part)

    def origin(self) -> str:
        """Where the numbers come from."""
        return bullets([f"{name}: {value}" for name, value in self.environment.items()])

    def plot(self) -> None:
        """A PNG per benchmark that has curves."""
        for name in self.benchmarks:
            curves = panels(self.of(name))
            if name not in WITHOUT_CURVES and curves:
                draw(name, curves, self.folder / f"{name}.png", self.environment["device"])


def bullets(items: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {item}" for item in items)


Column = tuple[str, Callable[[Line], str]]


def table(benchmark: str, lines: Sequence[Line]) -> str:
    """The measured lines in Markdown, without columns that no line has a value for."""
    columns = [[name, "---", *map(show, measured(lines))] for name, show in columns_of(benchmark)]
    rows = zip(*(column for column in columns if any(column[2:])), strict=True)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def columns_of(benchmark: str) -> list[Column]:
    """The columns of one benchmark's table."""

    def number(name: str, scale: float = 1.0, form: str = ".3g") -> Callable[[Line], str]:
        return lambda line: "" if line.get(name) is None else f"{line[name] * scale:{form}}"

    columns: list[Column] = [
        ("size", lambda line: line["size"]),
        ("what", lambda line: line["passes"]),
        ("tokens", lambda line: f"{line['length']:,}"),
        ("method", lambda line: line["method"]),
        ("ms", lambda line: f"{line['seconds'] * 1e3:.4g}"),
        ("busy ms", number("busy", 1e3, ".4g")),
        ("spread", lambda line: f"{line['spread']:.0%}" if line["runs"] > 1 else "one run"),
        ("peak MiB", number("memory", 2**-20, ",.0f")),
    ]
    if benchmark in ("scan", "windows"):
        columns += [("TFLOP/s", number("tflops")), ("GB/s", number("gbps"))]
        columns += [("of the floor", number("of_floor", form=".0%"))]
    else:
        columns += [("tokens/s", number("tokens_per_second", form=",.0f"))]
    if benchmark in ("decode", "short", "training"):
        columns += [("rows", number("batch", form=",.0f"))]
        columns += [("replayed", lambda line: line.get("replayed", ""))]
    if benchmark == "watching":
        columns += [("frames/s", number("frames_per_second", form=",.1f"))]
        columns += [("state or cache MiB", number("cache_bytes", 2**-20, ",.1f"))]
        columns += [("grew by bytes: state, GPU, host", grown)]
    if benchmark in ("ttft", "decode", "short", "generate"):
        columns += [("cache MiB", number("cache_bytes", 2**-20, ",.1f"))]
        columns += [("teacher's attention", attention)]
    columns += [("LinMU is faster", lambda line: f"{line['ratio']:.3g}×" if "ratio" in line else "")]
    return columns


def attention(line: Line) -> str:
    """Which of torch's kernels attended, where one did."""
    return "" if line["method"] == OURS else line.get("attention", "")


def grown(line: Line) -> str:
    """What a long run added."""
    if "growth" not in line:
        return ""
    parts = [line["state_growth"], *(line["growth"].get(name) for name in ("gpu", "host"))]
    return ", ".join("not measured" if part is None else f"{part:,}" for part in parts)


def growth(lines: Sequence[Line]) -> list[str]:
    """How each curve grows, in words."""
    found = []
    for (size, passes), methods in panels(lines).items():
        powers = {method: growth_exponent(series) for method, series in methods.items()}
        told = [f"{method} L^{power:.2f}" for method, power in powers.items() if power is not None]
        if told:
            found.append(f"growth over the longest four lengths, {size}, {passes}: {', '.join(told)}")
    return found


def crossovers(lines: Sequence[Line]) -> list[str]:
    """From which length on LinMU is faster, in words."""
    found = []
    for (size, passes), methods in panels(lines).items():
        ours = methods.get(OURS, {})
        for method, series in methods.items():
            common = ours.keys() & series.keys()
            if method == OURS or not common:
                continue
            length = crossover(ours, series)
            shortest = length is not None and length <= min(common)
            said = f"from {length:,.0f} tokens on" if length else f"not up to {max(common):,} tokens"
            if shortest:
                said = f"at all lengths measured, {min(common):,} to {max(common):,} tokens"
            found.append(f"faster than {method}, {size}, {passes}: {said}")
    return found


def left_out(lines: Sequence[Line]) -> list[str]:
    """What was asked for and not measured, with the reason; equal reasons together."""
    reasons: dict[tuple[str, str, str, str], list[str]] = {}
    for line in lines:
        if "seconds" not in line:
            place = (line["method"], line["size"], line["passes"], line["status"])
            reasons.setdefault(place, []).append(f"{line['length']:,}")
    return [
        f"not measured: {method}, {size}, {passes}, {', '.join(lengths)} tokens: {status}"
        for (method, size, passes, status), lengths in reasons.items()
    ]


def shortened(length: int) -> str:
    """A number of tokens for an axis: 4096 -> 4k."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if length >= unit:
            return f"{length / unit:.3g}{name}"
    return str(length)


def draw(benchmark: str, curves: dict[tuple[str, str], dict[str, Any]], path: Path, device: str) -> None:
    """One panel per size and kind of pass, both axes logarithmic, crossovers marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5.2 * len(curves), 4.2), squeeze=False)
    for axis, ((size, passes), methods) in zip(axes[0], curves.items(), strict=True):
        ours = methods.get(OURS, {})
        for method, series in methods.items():
            lengths = sorted(series)
            width = 2.5 if method == OURS else 1.4
            (line,) = axis.plot(
                lengths, [series[n] * 1e3 for n in lengths], "o-", label=method, lw=width, ms=4
            )
            length = crossover(ours, series) if method != OURS else None
            if length and length > min(ours.keys() & series.keys()):
                axis.axvline(length, color=line.get_color(), ls=":", lw=1)
                axis.annotate(
                    f"{length:,.0f}",
                    (length, 0.02),
                    xycoords=("data", "axes fraction"),
                    rotation=90,
                    color=line.get_color(),
                    fontsize=8,
                    ha="right",
                )
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{size}, {passes}")
        ticks = sorted({length for series in methods.values() for length in series})
        axis.set_xticks(ticks, [shortened(length) for length in ticks])
        axis.minorticks_off()
        axis.set_ylabel("ms per token and row" if benchmark == "decode" else "ms")
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{TITLES[benchmark]}, {device}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
