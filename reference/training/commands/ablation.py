"""`distill.py ablate`: the same run with one thing left out, or changed, at a time, and what that costs.

Every variant takes the same number of optimizer steps; those of a stage that is left out go to the others in
proportion. The spread is the standard deviation over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from ..config import STAGES, Config
from ..refusal import check
from ..run_folder import check_settings_of
from ..safety.atomic_writes import write_text
from .command_line import parse, take_flags, tell_usage, whole_number

Variant = Callable[[Config], Config]

OF_PAPER: dict[str, Variant] = {
    "full": lambda base: base,
    "without stage i": lambda base: with_stages(base, ("ii", "iii")),
    "without stage ii": lambda base: with_stages(base, ("i", "iii")),
    "without stage iii": lambda base: with_stages(base, ("i", "ii")),
    "without Local-Swin": lambda base: with_start(base, branches="flex"),
    "without Flex-MA": lambda base: with_start(base, branches="local"),
    "without the reverse scan": lambda base: with_mixer(base, reverse_scan=False),
    "random instead of attention init": lambda base: with_start(base, init="random"),
    "raster instead of Rotary-Major": lambda base: with_mixer(base, rotary_major=False),
}
OF_TEXT_ALONE: dict[str, Variant] = {
    "without the text window": lambda base: with_mixer(base, text_window=0),
    "half the text window": lambda base: with_mixer(base, text_window=base.mixer.text_window // 2),
    "twice the text window": lambda base: with_mixer(base, text_window=base.mixer.text_window * 2),
    "without the convolution": lambda base: with_mixer(base, conv_kernel=0),
    "without the scan's RoPE": lambda base: with_mixer(base, scan_rope=False),
    "without the heads' norm": lambda base: with_mixer(base, head_norm=False),
    "with a z gate": lambda base: with_mixer(base, output_gate=True),
    "half-lives an eighth": lambda base: with_half_lives(base, 1 / 8),
    "half-lives eight times": lambda base: with_half_lives(base, 8),
    "whole MLPs instead of LoRA": lambda base: replace(
        base, mlps=replace(base.mlps, tune="full", mlp_learning_rate=base.mlps.mlp_learning_rate / 10)
    ),
    "a quarter of LoRA's rank": lambda base: replace(
        base, mlps=replace(base.mlps, lora_rank=max(1, base.mlps.lora_rank // 4))
    ),
    "KL alone in stage iii": lambda base: with_layer_loss(base, 0),
    "the layers' error ten times": lambda base: with_layer_loss(base, 10),
}
VARIANTS = OF_PAPER | OF_TEXT_ALONE
# A decoder of text has no Local-Swin but its window, no reverse scan and no grids.
OF_TEXT = (
    "full", "without stage i", "without stage ii", "without Flex-MA", "random instead of attention init",
    *OF_TEXT_ALONE,
)  # fmt: skip
USAGE = """usage: distill.py ablate [--seeds N] [--variants "A,B"] [flags of a run]

The same run with one thing left out, or changed, at a time; what is done is taken over.

  --seeds N           runs of each variant (3)
  --variants "A,B"    which; by default the paper's, or with --mixer.text_only those of a decoder of text:
  {variants}
All other flags are those of a run: `distill.py --help`. --output is runs/ablation if it is left out."""
PERPLEXITY = "perplexity / teacher's"
MEASURES = {
    "accuracy": "accuracy",
    PERPLEXITY: "perplexity",
    "KL, nats": "kl",
    "same first choice": "agreement",
}


def ablate(arguments: list[str], run: Callable[[Config], Any]) -> str:
    """Run variants with all seeds; those that are done are taken over. Returns the table.

    Unless `--variants` names others: `OF_PAPER`, or with `--mixer.text_only` those of `OF_TEXT`.

    Args:
        arguments: --seeds and --variants, and flags of a run for all of them.
        run: distils with settings and returns what `results.json` holds.
    """
    tell_usage(arguments, USAGE.format(variants="\n  ".join(VARIANTS)))
    own, others = take_flags({"seeds": "3", "variants": ""}, arguments)
    seeds = whole_number("--seeds", own.seeds)
    named = any(flag.split("=")[0] == "--output" for flag in others)
    base = parse(others if named else [*others, "--output", "runs/ablation"])
    of_text = base.mixer.text_only
    names = own.variants.split(",") if own.variants else OF_TEXT if of_text else OF_PAPER
    unknown = [name for name in names if name not in VARIANTS]
    check(not unknown, f"--variants must be among {sorted(VARIANTS)}", unknown)
    measured = {
        name: [last_row(variant_of(base, name, base.seed + offset), run) for offset in range(seeds)]
        for name in names
    }
    folder = Path(base.output)
    table = table_of(measured)
    write_text(folder / "ablation.json", json.dumps(measured, indent=1))
    write_text(folder / "ablation.md", table)
    plot(measured, folder / "ablation.png", PERPLEXITY if of_text else "accuracy")
    print(f"\n{table}\ntable {folder / 'ablation.md'}, plot {folder / 'ablation.png'}")
    return table


def variant_of(base: Config, name: str, seed: int) -> Config:
    """The settings of one run of a variant."""
    folder = Path(base.output) / name.replace(" ", "_").replace("'", "") / f"seed_{seed}"
    return replace(VARIANTS[name](base), seed=seed, output=str(folder), resume=True)


def with_start(base: Config, **changes: Any) -> Config:
    """The same with a student that starts as something else."""
    return replace(base, student=replace(base.student, **changes))


def with_mixer(base: Config, **options: Any) -> Config:
    """The same with other options of M-MATE."""
    return replace(base, mixer=replace(base.mixer, **options))


def with_half_lives(base: Config, times: float) -> Config:
    """The same with memories so many times as long."""
    shortest, longest = base.mixer.half_life
    return with_mixer(base, half_life=(shortest * times, longest * times))


def with_layer_loss(base: Config, times: float) -> Config:
    """The same with the layers' error in stage iii weighing so many times as much."""
    return replace(base, stage_iii=replace(base.stage_iii, layer=base.stage_iii.layer * times))


def with_stages(base: Config, kept: Sequence[str]) -> Config:
    """Some stages alone, with as many steps in all as before: those of the others in proportion."""
    steps = {stage: base.of_stage(stage).steps for stage in STAGES}
    whole, own = sum(steps.values()), sum(steps[stage] for stage in kept)
    shared = {stage: round(steps[stage] * whole / own) for stage in kept[:-1]}
    shared[kept[-1]] = whole - sum(shared.values())
    stages = {f"stage_{stage}": replace(base.of_stage(stage), steps=count) for stage, count in shared.items()}
    return replace(base, stages=tuple(kept), allow_missing_stage=True, **stages)


def last_row(config: Config, run: Callable[[Config], Any]) -> dict[str, float]:
    """What the student of a run reached.

    Raises:
        RefusedError: if the folder holds one of other settings, done or not.
    """
    folder = Path(config.output)
    done = (folder / "student" / "config.json").is_file()
    if done:
        check_settings_of(folder, config)
    results = json.loads((folder / "results.json").read_text()) if done else run(config)
    row = results["rows"][f"stage {config.stages[-1]}"]
    relative = row["perplexity"] / results["rows"]["teacher"]["perplexity"]
    return {measure: row[measure] for measure in MEASURES.values()} | {"perplexity": relative}


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


def plot(measured: dict[str, list[dict[str, float]]], image: Path, title: str) -> None:
    """Draw one of `MEASURES` of every variant: mean, spread, and each seed as a point."""
    names = list(measured)[::-1]
    values = {name: [row[MEASURES[title]] for row in measured[name]] for name in names}
    figure = Figure(figsize=(7, 0.4 * len(names) + 1), layout="tight")
    axis = figure.add_subplot()
    axis.barh(names, [mean(values[n]) for n in names], xerr=[spread(values[n]) for n in names], alpha=0.6)
    for place, name in enumerate(names):
        axis.plot(values[name], [place] * len(values[name]), "k.")
    axis.set(xlabel=f"held-out {title}")
    axis.set(**({"xlim": (0, 1)} if title == "accuracy" else {"xscale": "log"}))
    figure.savefig(image, dpi=120)
