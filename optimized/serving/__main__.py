"""`python -m linmu.optimized.serving DIR [options]`: transformers' server, for a student's folder.

It is `transformers serve DIR [options]`, whose own `--help` lists the options, after the import that makes
students known to it. It answers one request at a time; others wait.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import transformers  # noqa: F401  # its import registers the students, see linmu/reference/__init__.py

from ...reference.checks import require

WHERE = "linmu.optimized.serving"
REFUSED = {
    "--continuous-batching": "it pages keys and values, which a student does not keep; use vLLM",
    "--compile": "it needs a static cache, and a student keeps a state",
    "--attn-implementation": "a student's decoder has its own",
}
NOTICE = f"{WHERE}: one request at a time; to serve many at once, use vLLM (optimized/serving/README.md)."


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse options of `transformers serve` that no student has.

    Raises:
        ValueError: naming the option, and why.
    """
    for argument in arguments:
        name = argument.split("=")[0]
        require(name not in REFUSED, WHERE, "options must suit a student", name, REFUSED.get(name))


def main(arguments: Sequence[str]) -> None:
    """Serve until interrupted."""
    from transformers.cli.transformers import main as transformers_command
    from transformers.utils.import_utils import is_serve_available

    check_arguments(arguments)
    if not is_serve_available():
        sys.exit(f"{WHERE}: needs FastAPI, uvicorn and openai; pip install 'linmu[serve]'")
    print(NOTICE, file=sys.stderr)
    sys.argv = ["transformers", "serve", *arguments]
    transformers_command()


if __name__ == "__main__":
    main(sys.argv[1:])
