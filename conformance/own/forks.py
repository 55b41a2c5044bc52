"""Programs run in copies of one process that has imported what they all need, which takes seconds.

    run_forked(INTERPRETER, "linmu.conformance.own.kernels.interpreter.trial", "scan_step", "float32")

What is imported, with its environment variables, has a process of its own, `python forks.py MODULE ...`,
which lives as long as its caller. It reads lines of JSON, [folder, path of stdout, path of stderr, program,
arguments ...], forks, runs the program in the fork as Python would, and answers with its exit status.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory


@dataclass(frozen=True)
class Start:
    """What programs are forked from: a process with these modules imported, in an environment set before."""

    modules: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


TRIALS = (
    "linmu.conformance.own.kernels.interpreter"  # not pytest's `conformance`, which would be imported again
)
INTERPRETER = Start(
    ("linmu.optimized", f"{TRIALS}.hasten"),
    (("TRITON_INTERPRET", "1"), ("OMP_NUM_THREADS", "1")),
)
COMMANDS = Start(
    ("linmu.optimized", "linmu.reference.training.commands.main", "linmu.reference.training.run")
)


def run_forked(
    start: Start, program: str | Path, *arguments: str, folder: Path | None = None
) -> subprocess.CompletedProcess:
    """Run a module, or a file, as `python -m MODULE` and `python FILE` do, in `folder` or here."""
    with TemporaryDirectory() as written:
        paths = [Path(written) / name for name in ("stdout", "stderr")]
        command = [str(part) for part in (folder or Path.cwd(), *paths, program, *arguments)]
        server = started(start)
        print(json.dumps(command), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError(f"forks: the process that forks must live, got exit status {server.wait()}")
        return subprocess.CompletedProcess(command[3:], int(answer), *(path.read_text() for path in paths))


@cache
def started(start: Start) -> subprocess.Popen:
    """The process that forks; it ends when its standard input does."""
    command = [sys.executable, "-m", "linmu.conformance.own.forks", *start.modules]
    environment = os.environ | dict(start.variables)
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def serve() -> None:
    """Fork for every line of standard input."""
    gc.disable()
    for module in sys.argv[1:]:
        import_module(module)
    gc.freeze()  # else each fork's collector looks at, and so copies, all that was imported
    gc.enable()
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            become(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(folder: str, stdout: str, stderr: str, program: str, *arguments: str) -> None:
    """Run the program as Python does, output into files, and end without taking down what was imported."""
    os.chdir(folder)
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv[:] = [program, *arguments]
    status = 0
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
