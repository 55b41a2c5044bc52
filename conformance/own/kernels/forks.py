"""Scripts run in copies of one process that has imported what they all need, which takes seconds.

    run_forked((("TRITON_INTERPRET", "1"),), "interpreter.trial", "scan_step", "float32")

Each set of environment variables has a process of its own, `python forks.py`, which lives as long as its
caller. It reads lines of JSON, [path of stdout, path of stderr, program, arguments ...], forks, runs the
program in the fork as Python would, and answers with its exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

Variables = tuple[tuple[str, str], ...]


def run_forked(variables: Variables, program: str | Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a module of this folder, or a file, in an environment set before anything was imported."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        command = [str(part) for part in (*paths, program, *arguments)]
        server = started(variables)
        print(json.dumps(command), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError(f"forks: the process that forks must live, got exit status {server.wait()}")
        return subprocess.CompletedProcess(command[2:], int(answer), *(path.read_text() for path in paths))


@cache
def started(variables: Variables) -> subprocess.Popen:
    """The process that forks; it ends when its standard input does."""
    command = [sys.executable, "-m", "linmu.conformance.own.kernels.forks"]
    environment = os.environ | dict(variables)
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def serve() -> None:
    """Fork for every line of standard input."""
    import linmu.optimized  # noqa: F401  what every script imports first

    if os.environ.get("TRITON_INTERPRET") == "1":
        from linmu.conformance.own.kernels.interpreter import patch_once_a_launch

        patch_once_a_launch()
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            become(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(stdout: str, stderr: str, program: str, *arguments: str) -> None:
    """Run the program as Python does, output into files, and end."""
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv[:] = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(f"linmu.conformance.own.kernels.{program}", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve()
