"""What a run measured, drawn: losses over its steps, and errors and use of the branches over its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..progress import TERMS, read_metrics
from .branch_usage import WAYS


def plot_losses(metrics: Path, image: Path) -> None:
    """Draw the loss of every stage over its steps, logarithmically."""
    logged = read_metrics(metrics)
    stages = list(dict.fromkeys(line["stage"] for line in logged))
    figure = Figure(figsize=(4 * max(1, len(stages)), 3), layout="tight")
    for place, stage in enumerate(stages, start=1):
        axis = figure.add_subplot(1, len(stages), place)
        lines = {line["step"]: line for line in logged if line["stage"] == stage}  # repeated after a resume
        for term in TERMS:
            points = [(step, line[term]) for step, line in sorted(lines.items()) if term in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=term)
        axis.set(title=f"stage {stage}", xlabel="step", yscale="log")
        axis.legend()
    figure.savefig(image, dpi=120, format="png")


def plot_layers(rows: dict[str, dict[str, Any]], image: Path) -> None:
    """Draw, layer by layer, both hidden errors after each stage, and what the last student relies on."""
    students = {name: row["layers"] for name, row in rows.items() if "layers" in row}
    figure = Figure(figsize=(12, 3), layout="tight")
    errors = (("mixer_error", "mixer, teacher's states"), ("layer_error", "layer, student's states"))
    for place, (error, title) in enumerate(errors, start=1):
        axis = figure.add_subplot(1, 3, place)
        for name, layers in students.items():
            axis.plot(
                [layer["layer"] for layer in layers], [layer[error] for layer in layers], "o-", label=name
            )
        axis.set(title=title, xlabel="layer", ylabel="relative error", yscale="log")
        axis.legend()
    axis = figure.add_subplot(1, 3, 3)
    name, layers = list(students.items())[-1]
    bottom = [0.0] * len(layers)
    for way in WAYS:
        shares = [layer.get(way, 0.0) for layer in layers]
        axis.bar([layer["layer"] for layer in layers], shares, bottom=bottom, label=way)
        bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
    axis.set(title=f"vision tokens rely on ({name})", xlabel="layer", ylim=(0, 1))
    axis.legend()
    for axis in figure.axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(image, dpi=120, format="png")
