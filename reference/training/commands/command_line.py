"""Flags from a dataclass, and mistakes of the user told without a traceback."""

from __future__ import annotations

import json
from typing import Any

from transformers import HfArgumentParser


class RefusedError(ValueError):
    """Something the user can put right; printed without a traceback."""


def check(holds: Any, must: str, got: Any, hint: str = "") -> None:
    """Raise `RefusedError("distill: must, got …; hint")` unless `holds`."""
    if not holds:
        raise RefusedError(f"distill: {must}, got {got}" + (f"; {hint}" if hint else ""))


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """ "2,4,4" -> (2, 4, 4)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RefusedError(f"distill: --{flag} must be whole numbers, like 4,8,8, got {text!r}") from None


def from_json(flag: str, text: str) -> Any:
    """The value of a flag that is given as JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RefusedError(f"distill: --{flag} must be JSON, got {text!r} ({error})") from None


def parse_flags(settings: type, presets: dict[str, dict[str, Any]], arguments: list[str], about: str) -> Any:
    """The command line as an instance of `settings`: a flag for every field, defaults from the preset,
    unknown flags refused.

    Args:
        settings: a dataclass with a field `preset`.
        presets: defaults by preset.
        arguments: the command line without the program.
        about: what --help says first.
    """
    parser = HfArgumentParser(settings, description=about, allow_abbrev=False)
    preset = parser.parse_known_args(arguments)[0].preset
    parser.set_defaults(**presets[preset])
    try:
        config, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except RefusedError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"distill: flags must be among those of --help, got {' '.join(unknown)}")
    return config
