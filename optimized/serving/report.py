"""Tables and a plot of the lines of `benchmark`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMAND = "python -m linmu.optimized.serving.benchmark"
SHORT = 1  # token of a prompt that is no part of what is measured: prompts of one come in together


def report(files: list[str], folder: Path) -> None:
    """Write README.md, decoding.png and the lines themselves into a folder, from lines of both."""
    lines = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(lines, indent=1) + "\n")
    plain = [line for line in lines if "quantization" not in line]
    parts = [header(lines), held_table(plain), decoding_table(plain), prompt_table(plain), fp8_table(lines)]
    (folder / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    plot(plain, folder / "decoding.png")


def header(lines: list[dict[str, Any]]) -> str:
    """Say what was run."""
    start = next(line for line in lines if line["cell"] == "start")
    found = ", ".join(f"{name} {start[name]}" for name in ("vllm", "torch", "transformers"))
    return f"""# Student and teacher in vLLM: {start["device"]}

The decoder of Qwen2.5-VL-7B, random weights, bfloat16, one {start["device"]}, {found}.
Each is alone in a process:

```text
{COMMAND} student --out student.jsonl
{COMMAND} teacher --out teacher.jsonl
{COMMAND} report --out student.jsonl teacher.jsonl --folder FOLDER
```

The student has a text window of 128 and decodes from CUDA graphs of whole steps; the teacher runs under
vLLM's defaults (FlashAttention 3, torch.compile, CUDA graphs) without prefix caching. *Held* is how many
requests the memory holds that vLLM has left for them. A step is the difference of two runs by their tokens,
wall time. The teacher's keys and values are constants where it decodes; they are computed where a prompt is
timed. A student's step does not depend on the length: it was measured from the first token on, and after
longer prompts below."""


def of(lines: list[dict[str, Any]], who: str, cell: str) -> list[dict[str, Any]]:
    """Return what was measured of one kind."""
    return [line for line in lines if (line["who"], line["cell"]) == (who, cell) and "skipped" not in line]


def table(names: list[str], rows: list[list[Any]]) -> str:
    """Return Markdown."""
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(part: float, whole: float) -> str:
    """Return how many times as much."""
    return f"{part / whole:.2f}×" if part < 10 * whole else f"{part / whole:.0f}×"


def held_table(lines: list[dict[str, Any]]) -> str:
    """Requests in memory by length, and tokens a second with as many."""
    rooms = of(lines, "teacher", "pool"), of(lines, "student", "pool")
    if not all(rooms):
        return ""
    theirs, ours = (room[0]["held"] for room in rooms)
    best = max((line["tokens_per_second"], line["requests"]) for line in of(lines, "student", "decoding"))
    rows = []
    for length in sorted(map(int, theirs)):
        pair = theirs[str(length)], ours.get(str(length), rooms[1][0]["blocks"])
        row = [f"{length:,}", f"{pair[0]:,}", f"{pair[1]:,}", times(pair[1], pair[0])]
        full = [line for line in of(lines, "teacher", "decoding") if line["length"] == length]
        fastest = max(((line["tokens_per_second"], line["requests"]) for line in full), default=None)
        if fastest is None:
            rows.append([*row, "not measured", "", ""])
            continue
        said = (f"{speed:,.0f} ({requests:,} at once)" for speed, requests in (fastest, best))
        rows.append([*row, *said, times(best[0], fastest[0])])
    names = ["tokens", "teacher holds", "student holds", "ratio"]
    return "## When full\n\n" + table([*names, "teacher, tokens/s", "student, tokens/s", "ratio"], rows)


def decoding_table(lines: list[dict[str, Any]]) -> str:
    """Steps by length and requests at once."""
    ours = {line["requests"]: line for line in of(lines, "student", "decoding")}
    rows = []
    for line in sorted(of(lines, "teacher", "decoding"), key=lambda line: (line["length"], line["requests"])):
        own = ours.get(line["requests"])
        row = [
            f"{line['length']:,}",
            line["requests"],
            line["ms_a_step"],
            f"{line['tokens_per_second']:,.0f}",
        ]
        if own is None:
            rows.append([*row, "", "", ""])
            continue
        speed = own["tokens_per_second"]
        rows.append([*row, own["ms_a_step"], f"{speed:,.0f}", times(speed, line["tokens_per_second"])])
    alone = [line for count, line in ours.items() if all(row[1] != count for row in rows)]
    rows += [
        ["any", each["requests"], "", "", each["ms_a_step"], f"{each['tokens_per_second']:,.0f}", ""]
        for each in alone
    ]
    names = ["tokens", "at once", "teacher, ms a step", "tokens/s", "student, ms a step", "tokens/s", "ratio"]
    return "## Decoding\n\n" + table(names, rows) + "\n\n![Tokens a second](decoding.png)"


def prompt_table(lines: list[dict[str, Any]]) -> str:
    """First tokens of prompts that are computed."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for who in ("teacher", "student"):
        for line in of(lines, who, "prompt"):
            found.setdefault((line["length"], line["requests"]), {})[who] = line
    rows = []
    for (length, requests), pair in sorted(found.items()):
        row: list[Any] = [f"{length:,}", requests]
        for name in ("ms_to_first_token", "ms_between_tokens"):
            row += [pair[who][name] if who in pair else "not measured" for who in ("teacher", "student")]
        rows.append(row)
    both = [
        f"{what}, ms: {who}" for what in ("first token", "between tokens") for who in ("teacher", "student")
    ]
    text = "Mean over the requests, which come all at once and wait for one another; then the median."
    return f"## Prompts\n\n{text}\n\n" + table(["tokens", "at once", *both], rows)


def fp8_table(lines: list[dict[str, Any]]) -> str:
    """The student's steps with weights in fp8, if they were measured."""
    rows = []
    for line in of(lines, "student", "decoding"):
        if line.get("quantization") == "fp8":
            rows.append([line["requests"], line["ms_a_step"], f"{line['tokens_per_second']:,.0f}"])
    if not rows:
        return ""
    text = "`--quantization fp8`: vLLM quantises the MLPs; the blocks' weights stay as they are."
    return f"## fp8\n\n{text}\n\n" + table(["at once", "student, ms a step", "tokens/s"], sorted(rows))


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens a second by requests at once."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    teachers = of(lines, "teacher", "decoding")
    kinds = [("student, any length", of(lines, "student", "decoding"))]
    for length in sorted({line["length"] for line in teachers}):
        kinds.append((f"teacher, {length:,}", [line for line in teachers if line["length"] == length]))
    for name, drawn in kinds:
        points = sorted((line["requests"], line["tokens_per_second"]) for line in drawn)
        axes.plot(*zip(*points, strict=True), "o-" if name.startswith("student") else "s--", label=name)
    axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="tokens a second")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
