"""What `distill.py` and `python -m linmu.reference.training` do: read the command line, distil, and tell."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

from ..config import Config, check_settings
from ..refusal import INTERRUPTED, RefusedError
from ..run import Run
from .ablation import ablate
from .benchmark import benchmark
from .command_line import parse
from .dry_run import dry_run
from .evaluate import evaluate_student
from .quantise import quantise_student

ABOUT = (
    "Distil a vision-language model into LinMU, in three stages (LinMU, arXiv 2601.01322). Other commands:"
    " evaluate, quantise, benchmark, ablate; `distill.py COMMAND --help` says what they take."
)

GOES_ON = {
    "": "; the same command with --resume goes on from the last checkpoint",
    "ablate": "; the same command goes on",
    "evaluate": "; nothing was written",
    "quantise": "; nothing was written",
    "benchmark": "; no table was written",
}


def main(arguments: list[str] | None = None) -> Any:
    """Do what the command line asks for; returns what it printed or wrote at the end.

    Raises:
        RefusedError: for what the user can put right.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and (command := COMMANDS.get(arguments[0])):
        return command(arguments[1:])
    return distil(parse(arguments, ABOUT))


def distil(config: Config) -> dict[str, Any]:
    """Distil, or describe it; returns what `results.json` holds."""
    check_settings(config)
    run = Run(config)
    if config.dry_run:
        run.open()
        dry_run(run)
        return run.results
    run.prepare()
    for stage in run.stages:
        run.teach(stage)
    return run.finish()


COMMANDS = {
    "ablate": partial(ablate, run=distil),
    "evaluate": evaluate_student,
    "quantise": quantise_student,
    "benchmark": benchmark,
}  # what the first word may be; without one, the flags are those of a run


def run_command() -> None:
    """`main`, with refusals and interruptions told without a traceback."""
    try:
        main()
    except RefusedError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        command = sys.argv[1] if len(sys.argv) > 1 else ""
        print(f"distill: interrupted{GOES_ON.get(command, GOES_ON[''])}", file=sys.stderr)
        sys.exit(INTERRUPTED)
