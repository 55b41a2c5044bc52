"""Tables and a plot of the lines of `benchmark`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMAND = "python -m linmu.optimized.serving.benchmark"
SHORT = 128  # tokens of a prompt that is no part of what is measured: they fill the window


VARIANTS = {  # options of the student's, and what is said of them
    "quantization": ("fp8", "`--quantization fp8`: vLLM quantises the MLPs, the blocks stay as they are."),
    "mamba_ssm_cache_dtype": (
        "States in few bits",
        "`--mamba-ssm-cache-dtype`: the scan's states rounded after each step, computed in float32.",
    ),
    "options": ("Options of the student's", "`--additional-config`: what is off unless asked for."),
}


def report(files: list[str], folder: Path) -> None:
    """Write README.md, decoding.png and the lines themselves into a folder, from lines of both."""
    lines = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(lines, indent=1) + "\n")
    plain = [line for line in lines if not any(name in line for name in VARIANTS)]
    parts = [
        header(lines),
        held_table(plain),
        decoding_table(plain),
        prompt_table(plain),
        served_table(plain),
        *(variant_table(lines, *variant) for variant in VARIANTS.items()),
        profile_table(plain),
    ]
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
vLLM's defaults (FlashAttention 3, torch.compile, CUDA graphs), with graphs of few sizes and without prefix
caching. A step is the median time between the outputs of two steps in which all those requests had a token.
The teacher's keys and values are constants where it decodes, each request's in memory of its own; they are
computed where prompts are timed. A student's step does not depend on the length: it was measured after
prompts of 128 tokens, which fill its window, and after longer ones below."""


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
    ours = fastest(of(lines, "student", "decoding"))
    if not all(rooms) or ours is None:
        return ""
    theirs, blocks = rooms[0][0]["held"], rooms[1][0]["blocks"]
    rows = []
    for length in sorted(map(int, theirs)):
        row = [f"{length:,}", f"{theirs[str(length)]:,}", f"{blocks:,}", times(blocks, theirs[str(length)])]
        best = fastest([line for line in of(lines, "teacher", "decoding") if line["length"] == length])
        if best is None:
            rows.append([*row, "not measured", "", ""])
            continue
        said = (f"{line['tokens_per_second']:,.0f} ({line['requests']:,} at once)" for line in (best, ours))
        rows.append([*row, *said, times(ours["tokens_per_second"], best["tokens_per_second"])])
    names = ["tokens", "teacher holds", "student holds", "ratio"]
    text = """*Holds*: requests of so many tokens and some more in the memory that vLLM has left for them.
Tokens a second: decoding alone, each with as many requests at once as it was fastest with."""
    head = table([*names, "teacher, tokens/s", "student, tokens/s", "ratio"], rows)
    return f"## When full\n\n{text}\n\n{head}"


def fastest(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the line of most tokens a second; None = there is none."""
    return max(lines, key=lambda line: line["tokens_per_second"], default=None)


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


def pairs_of(lines: list[dict[str, Any]], cell: str) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Lines of a cell by (length, requests), each by whose it is, in order."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for who in ("teacher", "student"):
        for line in of(lines, who, cell):
            found.setdefault((line["length"], line["requests"]), {})[who] = line
    return sorted(found.items())


def prompt_table(lines: list[dict[str, Any]]) -> str:
    """First tokens of prompts that are computed."""
    rows = []
    for (length, requests), pair in pairs_of(lines, "prompt"):
        row: list[Any] = [f"{length:,}", requests]
        for name in ("ms_to_first_token", "ms_between_tokens"):
            row += [pair[who][name] if who in pair else "not measured" for who in ("teacher", "student")]
        rows.append(row)
    both = [
        f"{what}, ms: {who}" for what in ("first token", "between tokens") for who in ("teacher", "student")
    ]
    text = "Mean over the requests, which come all at once and wait for one another; then the median."
    return f"## Prompts\n\n{text}\n\n" + table(["tokens", "at once", *both], rows)


def served_table(lines: list[dict[str, Any]]) -> str:
    """Requests from their prompts to their last tokens."""
    rows = []
    for (length, requests), pair in pairs_of(lines, "served"):
        row: list[Any] = [f"{length:,}", requests]
        for name in ("seconds", "tokens_per_second", "ms_to_first_token", "ms_between_tokens"):
            row += [
                f"{pair[who][name]:,.1f}" if who in pair else "not measured" for who in ("teacher", "student")
            ]
        both = [pair[who]["tokens_per_second"] for who in ("student", "teacher")] if len(pair) == 2 else None
        rows.append([*row[:6], times(*both) if both else "", *row[6:]])
    if not rows:
        return ""
    whats = ["seconds", "tokens/s", "ratio", "first token, ms", "between tokens, ms"]
    names = [
        name
        for what in whats
        for name in ([what] if what == "ratio" else [f"{what}: {who}" for who in ("teacher", "student")])
    ]
    text = """Prompts that are computed and 128 tokens after each, all requests at once, timed from the first
prompt to the last token: tokens/s are those of the answers over all of that time."""
    return f"## Served\n\n{text}\n\n" + table(["tokens", "at once", *names], rows)


def profile_table(lines: list[dict[str, Any]]) -> str:
    """How long the GPU was busy, and with what."""
    parts = []
    for line in of(lines, "student", "profile"):
        steps = line["steps"]
        what = (
            f"{line['requests']} prompts of {line['length']:,} tokens, computed"
            if line.get("length")
            else (f"{line['requests']} requests, {steps} steps")
        )
        each = max(steps, 1)
        clock, busy = line["wall_ms"] / each, line["busy_ms"] / each
        rows = [[f"`{name}`", round(n / each, 1), round(ms / each, 3)] for name, n, ms in line["kernels"]]
        count = line["launches"] / each
        text = f"**{what}**: {clock:.2f} ms by the clock, {busy:.2f} in kernels, {count:.0f} of them"
        parts.append(f"{text}.\n\n" + table(["kernel", "launches", "ms"], rows))
    if not parts:
        return ""
    text = "torch's profiler in the worker; times are a step's, and of prompts of all of it."
    return "\n\n".join(["## Where the student's time goes", text, *parts])


def variant_table(lines: list[dict[str, Any]], name: str, said: tuple[str, str]) -> str:
    """The student's steps with this variant as the first, if they were measured."""
    found = [line for line in lines if name in line and next(filter(line.get, VARIANTS)) == name]

    def named(line: dict[str, Any]) -> str:
        return ", ".join(line[each] for each in VARIANTS if each in line)

    rows = [
        [named(line), line["requests"], line["ms_a_step"], f"{line['tokens_per_second']:,.0f}"]
        for line in of(found, "student", "decoding")
    ]
    if not rows:
        return ""
    pools = of(found, "student", "pool")
    rooms = [f"With {named(line)} the memory holds {line['blocks']:,}." for line in pools]
    title, text = said
    head = table(["", "at once", "student, ms a step", "tokens/s"], sorted(rows))
    return f"## {title}\n\n{' '.join([text, *rooms])}\n\n{head}"


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
