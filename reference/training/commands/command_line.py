"""The command line and settings files as a `Config`.

tyro makes flags, help and refusals of the dataclasses. A settings file is flags written down: it is read as
if they had been given first, so one reader checks both.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
import yaml

from ..config import Config, check_settings
from ..presets import PRESETS
from ..refusal import RefusedError, check
from ..run_folder import SETTINGS, is_run
from ..run_folder import read_settings as settings_in


def parse(arguments: list[str], about: str = "") -> Config:
    """Settings from flags, over those of a file, over those of a preset.

    Args:
        arguments: the command line without the program.
        about: what --help says first.
    Raises:
        RefusedError: for a settings file that cannot be read, --settings or --preset without a value.
        SystemExit: for flags that do not exist or do not go together, told on stderr.
    """
    arguments = expand_resume(arguments)
    known, _ = take_flags({"preset": None, "settings": ""}, arguments)
    written = read_settings(Path(known.settings)) if known.settings else {}
    preset = known.preset or written.get("preset") or "demo"
    config = PRESETS.get(preset, PRESETS["demo"])  # a wrong name is refused below
    if written:
        config = read_flags(config, [*as_flags(written)], f"distill.py, settings of {known.settings}", about)
    config = read_flags(config, arguments, "distill.py", about)
    try:
        check_settings(config)
    except RefusedError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    return config


def tell_usage(arguments: list[str], usage: str) -> None:
    """Print what a command takes, and end, where its arguments ask for that."""
    if {"-h", "--help"} & {*arguments}:
        print(usage)
        sys.exit(0)


def read_flags(defaults: Config, flags: list[str], program: str, about: str) -> Config:
    """The settings that flags change."""
    return tyro.cli(
        Config, prog=program, description=about, args=flags, default=defaults, use_underscores=True
    )


def take_flags(defaults: dict[str, Any], arguments: list[str]) -> tuple[Namespace, list[str]]:
    """Some flags, as texts, and all other arguments.

    Args:
        defaults: by the flags' names.
        arguments: a command line.
    Raises:
        RefusedError: for a flag that is not followed by its value.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    try:
        return parser.parse_known_args(arguments)
    except ArgumentError as error:
        flag = error.argument_name
        raise RefusedError(f"distill: {flag} must be followed by a value, got none") from None


def whole_number(flag: str, text: str) -> int:
    """The value of a flag that counts something.

    Raises:
        RefusedError: unless it is at least 1.
    """
    number = int(text) if text.isdecimal() else 0
    check(number >= 1, f"{flag} must be a number of at least 1", text)
    return number


def expand_resume(arguments: list[str]) -> list[str]:
    """`--resume DIR` goes on in DIR with the settings that it was begun with."""
    place = arguments.index("--resume") + 1 if "--resume" in arguments else len(arguments)
    if place >= len(arguments) or arguments[place].startswith("-"):
        return arguments
    folder = Path(arguments[place])
    kept = folder / SETTINGS
    must = "--resume must be followed by a run's folder, with a config.json"
    check(kept.is_file(), must, folder)
    check(is_run(settings_in(folder)), must, f"{folder}, whose config.json is no run's")
    own = ["--output", str(folder), "--settings", str(kept)]
    return [*arguments[:place], *own, *arguments[place + 1 :]]


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML or JSON file; the latter is YAML, too."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise RefusedError(f"distill: --settings must be a YAML or JSON file, got {path}: {error}") from None
    check(isinstance(settings, dict), "--settings must hold settings by name", f"{path}: {settings!r:.80}")
    return settings


def as_flags(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The flags that a settings file stands for."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from as_flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield f"--{prefix}{'' if value else 'no_'}{name}"
        elif isinstance(value, list):
            yield from (f"--{prefix}{name}", *map(str, value))
        else:
            yield f"--{prefix}{name}={value}"
