"""`distill.py benchmark`: public benchmarks in lmms-eval, teacher and student in one table.

lmms-eval runs once for each model, in processes of its own; the table is made of the results that it leaves
in the folder.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..refusal import check
from ..safety.atomic_writes import write_text
from .command_line import take_flags, tell_usage, whole_number
from .evaluate import after_command

LAUNCH = ("-m", "torch.distributed.run", "--nproc_per_node")
USAGE = """usage: distill.py benchmark STUDENT --tasks A,B [flags]

Public benchmarks in lmms-eval, a student's and its teacher's results in one table.

  --teacher FOLDER_OR_HUB_ID    measured first, with the same flags; none if it is left out
  --output FOLDER               for lmms-eval's results and the table (runs/benchmark)
  --num_processes N             that share the questions (1)
  --model_args A=1,B=2          of LinMU in lmms-eval: dtype, backend, max_num_frames, max_pixels, ...
All other flags are lmms-eval's own: `lmms-eval --help`."""
EVALUATE = ("-m", "lmms_eval", "--model", "linmu")


def benchmark(arguments: list[str]) -> str:
    """Run lmms-eval on a student, and on its teacher if there is one. Returns the table, in Markdown.

    Args:
        arguments: the student's folder; `--teacher` and `--output`; `--num_processes` to share the documents
            among; all others are lmms-eval's own, `--model_args` those of `LinMU` but for `pretrained`.
    Raises:
        RefusedError: without a student, without lmms-eval, and if it ends without results.
    """
    tell_usage(arguments, USAGE)
    student, *flags = after_command("benchmark", arguments)
    defaults = {"teacher": None, "output": "runs/benchmark", "model_args": "", "num_processes": "1"}
    own, others = take_flags(defaults, flags)
    processes = whole_number("--num_processes", own.num_processes)
    named = any(flag.split("=")[0] == "--tasks" for flag in others)
    check(named, "--tasks must name tasks of lmms-eval", "none", "`lmms-eval tasks list` names all")
    found = importlib.util.find_spec("lmms_eval")
    check(found, "benchmark must find lmms-eval", "none", "pip install 'linmu[harness]'")
    launch = [*LAUNCH, str(processes)] if processes > 1 else []
    models = {"teacher": own.teacher, "student": student}
    results = {}
    for name, folder in models.items():
        if folder is not None:
            model = ",".join(filter(None, (f"pretrained={folder}", own.model_args)))
            command = [sys.executable, *launch, *EVALUATE, "--model_args", model, *others]
            results[name] = run(command, Path(own.output) / name)
    table = table_of(results)
    write_text(Path(own.output) / "benchmark.md", table)
    print(f"\n{table}\ntable {Path(own.output) / 'benchmark.md'}")
    return table


def run(command: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What lmms-eval measured, by task: metrics by name. Its exit status does not tell of a failure."""
    before = {*folder.rglob("*results.json")}
    subprocess.run([*command, "--output_path", str(folder)])
    written = {*folder.rglob("*results.json")} - before
    check(len(written) == 1, "lmms-eval must end with results", "none", "what it printed above says why")
    return json.loads(written.pop().read_text())["results"]


def table_of(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each metric of each task, a column for each model: value ± standard error."""
    lines = [f"| task | metric | {' | '.join(results)} |", f"| --- | --- |{' --- |' * len(results)}"]
    first = next(iter(results.values()))
    for task, measures in first.items():
        for name in measures:
            metric, comma, _ = name.partition(",")
            if comma and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                cells = [cell(of[task], name) for of in results.values()]
                if any(cells):
                    lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(measures: dict[str, Any], name: str) -> str:
    """One number of the table; empty for what is none, such as a file written for a server to score."""
    value, error = measures.get(name), measures.get(name.replace(",", "_stderr,"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, int | float) else "")
