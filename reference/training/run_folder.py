"""The folder of a run: who may enter it, what it holds, what may be deleted."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .config import STAGES, Config, settings_of
from .refusal import RefusedError, check
from .safety.atomic_writes import PART, write_text

# settings that may change when a run goes on
FREE = ("preset", "output", "stages", "allow_missing_stage", "workers", "report")
STAGE_FOLDERS = tuple(f"stage_{stage}" for stage in STAGES)
SETTINGS = "config.json"
DIGESTS = "digests.json"
# all that a run writes; its settings come first and are deleted last, so that they tell a run's folder
WRITTEN = (
    *STAGE_FOLDERS, "student", "metrics.jsonl", "results.json", "broken.jsonl", "loss.png", "layers.png",
    "example.png", DIGESTS, SETTINGS,
)  # fmt: skip


def taught_path(config: Config, stage: str) -> Path:
    """What a stage leaves when it is done."""
    return Path(config.output) / f"stage_{stage}" / "taught.safetensors"


def check_folder(config: Config) -> None:
    """Refuse what `claim_folder` refuses; nothing is left there.

    Raises:
        RefusedError: if another run, or something else, is in the folder, or nothing can be written there.
    """
    folder = Path(config.output)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:  # permissions alone say nothing of a read-only disk, or of a full one
        TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        must = "--output must be a folder that can be written"
        raise RefusedError(f"distill: {must}, got {folder}: {error.strerror}") from error
    own = (folder / SETTINGS).is_file() and is_run(read_settings(folder))
    foreign = [] if own else [name for name in WRITTEN if (folder / name).exists()]
    must = "--output must be a folder without a run, or without files of the names that a run writes"
    check(not foreign, must, f"{folder} with {', '.join(foreign)}, which no run wrote", "name another folder")
    if own and not config.overwrite:
        check_settings_of(folder, config)
    check_stages(config)


def check_settings_of(folder: Path, config: Config) -> None:
    """Refuse to go on in a folder whose run has other settings, or where --resume is not given."""
    hint = "--resume goes on in it, --overwrite empties it, --output names another"
    may_enter = config.resume or config.stages[0] != "i"
    check(may_enter, "--output must be a folder without a run", folder, hint)
    before, settings = read_settings(folder), json.loads(json.dumps(settings_of(config)))
    others = sorted(before.keys() ^ settings.keys())
    must = f"{folder / SETTINGS} must hold the settings of this version of linmu"
    hint = "resume it with the version that began it, or name another --output"
    check(not others, must, f"a run of another, which differ in {', '.join(others[:5])}", hint)
    changed = [name for name, value in settings.items() if name not in FREE and before[name] != value]
    must, hint = "a run must go on with the settings it began with", "--resume DIR takes them from DIR"
    check(not changed, must, f"other values of {changed}", hint)


def check_data(config: Config, found: dict[str, str]) -> None:
    """Refuse to go on with other data than those that the run in the folder began with.

    Args:
        config: the settings.
        found: a digest of each data set, by its name, as of `data.digest`.
    Raises:
        RefusedError: if one has another digest than then.
    """
    path = Path(config.output) / DIGESTS
    if config.overwrite or not path.is_file():  # nothing is there, or a run that had no samples yet
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in found.keys() & before.keys() if found[name] != before[name])
    hint = "put them back as they were, or name another --output"
    check(not changed, "a run must go on with the data it began with", f"other rows in {changed}", hint)


def check_stages(config: Config) -> None:
    """Refuse a stage that would find no result of the one before it."""
    for before, stage in pairwise(STAGES):
        if stage not in config.stages or before in config.stages or config.allow_missing_stage:
            continue
        path = taught_path(config, before)
        done = path.is_file() and not config.overwrite
        hint = f"run --stages {before} first, or give --allow_missing_stage"
        check(done, f"stage {stage} must start from stage {before}", f"no {path}", hint)


def claim_folder(config: Config, data: dict[str, str]) -> None:
    """Start a folder, or go on in one whose run had the same settings and data.

    Args:
        config: the settings.
        data: as of `check_data`.
    Raises:
        RefusedError: as of `check_folder` and `check_data`.
    """
    check_folder(config)
    check_data(config, data)
    folder = Path(config.output)
    if config.overwrite:
        for name in WRITTEN:
            remove(folder / name)
            remove(folder / f"{name}{PART}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS, json.dumps(settings_of(config), indent=1))
    write_text(folder / DIGESTS, json.dumps(data, indent=1))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_settings(folder: Path) -> dict[str, Any]:
    """A folder's config.json, {} if it holds no settings."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def is_run(settings: dict[str, Any]) -> bool:
    """Whether a config.json is a run's, of whatever version, and not a model's."""
    return {"teacher", "data", "output", "stages", "backend"} <= settings.keys()
