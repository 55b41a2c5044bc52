"""`distill.py ablate`: the same run with one thing left out at a time, and what that costs.

Every variant takes the same number of optimizer steps; those of a stage that is left out go to the others in
proportion. The spread is the standard deviation over seeds.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from ..safety.atomic_writes import write_text
from ..stages import STAGES
from .command_line import check

if TYPE_CHECKING:
    from distill import Config

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "without stage i": {"stages": "ii,iii"},
    "without stage ii": {"stages": "i,iii"},
    "without stage iii": {"stages": "i,ii"},
    "without Local-Swin": {"branches": "flex"},
    "without Flex-MA": {"branches": "local"},
    "without the backward scan": {"mixer": {"reverse_scan": False}},
    "random instead of attention init": {"init": "random"},
    "raster instead of Rotary-Major": {"mixer": {"rotary_major": False}},
}
MEASURES = {"accuracy": "accuracy", "KL, nats": "kl", "same first choice": "agreement"}


def ablate(arguments: list[str], parse: Callable[[list[str]], Config], run: Callable[[Config], Any]) -> str:
    """Run all variants with all seeds; those that are done are taken over. Returns the table.

    Args:
        arguments: --seeds and --variants, and flags of a run for all of them.
        parse: makes settings of flags.
        run: distils with settings and returns what `results.json` holds.
    """
    parser = ArgumentParser("distill.py ablate", add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    own, others = parser.parse_known_args(arguments)
    unknown = [name for name in own.variants.split(",") if name not in VARIANTS]
    check(not unknown, f"--variants must be among {sorted(VARIANTS)}", unknown)
    check(own.seeds >= 1, "--seeds must be at least 1", own.seeds)
    base = parse(others)
    base = replace(base, output=base.output if "--output" in others else "runs/ablation")
    measured = {
        name: [
            last_row(varied_config(base, name, seed), run) for seed in range(base.seed, base.seed + own.seeds)
        ]
        for name in own.variants.split(",")
    }
    folder = Path(base.output)
    table = table_of(measured)
    write_text(folder / "ablation.json", json.dumps(measured, indent=1))
    write_text(folder / "ablation.md", table)
    plot(measured, folder / "ablation.png")
    print(f"\n{table}\ntable {folder / 'ablation.md'}, plot {folder / 'ablation.png'}")
    return table


def varied_config(base: Config, name: str, seed: int) -> Config:
    """The settings of one run of a variant."""
    changes = dict(VARIANTS[name])
    if "mixer" in changes:
        changes["mixer"] = json.dumps(base.mixer_options | changes["mixer"])
    if "stages" in changes:
        kept = changes["stages"].split(",")
        changes |= {"steps": ",".join(map(str, shared_out(base, kept))), "allow_missing_stage": True}
    folder = Path(base.output) / name.replace(" ", "_") / f"seed_{seed}"
    return replace(base, **changes, seed=seed, output=str(folder), resume=True)


def shared_out(base: Config, kept: list[str]) -> list[int]:
    """Steps of the three stages where only some are kept, as many in all as before."""
    steps = [base.steps_of(stage) for stage in STAGES]
    own = sum(number for stage, number in zip(STAGES, steps, strict=True) if stage in kept)
    wanted = [
        round(number * sum(steps) / own) if stage in kept else 1
        for stage, number in zip(STAGES, steps, strict=True)
    ]
    last = STAGES.index(kept[-1])
    rest = sum(number for stage, number in zip(STAGES, wanted, strict=True) if stage in kept[:-1])
    wanted[last] = sum(steps) - rest
    return wanted


def last_row(config: Config, run: Callable[[Config], Any]) -> dict[str, float]:
    """What the student of a run reached."""
    folder = Path(config.output)
    done = (folder / "student" / "config.json").is_file()
    results = json.loads((folder / "results.json").read_text()) if done else run(config)
    row = results["rows"][f"stage {config.stage_list[-1]}"]
    return {measure: row[measure] for measure in MEASURES.values()}


def table_of(measured: dict[str, list[dict[str, float]]]) -> str:
    """One Markdown table: mean ± spread over seeds."""
    seeds = len(next(iter(measured.values())))
    lines = [f"| {seeds} seeds each | " + " | ".join(MEASURES) + " |", "| --- |" + " --- |" * len(MEASURES)]
    for name, rows in measured.items():
        cells = [[row[measure] for row in rows] for measure in MEASURES.values()]
        lines.append(
            f"| {name} | " + " | ".join(f"{mean(cell):.3f} ± {spread(cell):.3f}" for cell in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def plot(measured: dict[str, list[dict[str, float]]], image: Path) -> None:
    """Draw the accuracy of every variant: mean, spread, and each seed as a point."""
    names = list(measured)[::-1]
    accuracy = {name: [row["accuracy"] for row in measured[name]] for name in names}
    figure = Figure(figsize=(7, 0.4 * len(names) + 1), layout="tight")
    axis = figure.add_subplot()
    axis.barh(names, [mean(accuracy[n]) for n in names], xerr=[spread(accuracy[n]) for n in names], alpha=0.6)
    for place, name in enumerate(names):
        axis.plot(accuracy[name], [place] * len(accuracy[name]), "k.")
    axis.set(xlabel="held-out accuracy", xlim=(0, 1))
    figure.savefig(image, dpi=120)
