"""What a student's folder says about itself: to stock classes, to whoever opens it, and on the Hub.

config.json     "linmu": {...}, and a text in the place of the decoder's `attention_dropout`, which no stock
                class takes: it would draw new attention in the place of M-MATE, and only warn
README.md       the model card, with the numbers of the run, if there was one
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..checks import require

MARKED = (
    "attention_dropout"  # of the decoder: a number, which stock classes check and their base class does not
)
MARK = "linmu.MMATE in the place of attention: import linmu.reference, and open this folder with its load()"
OLD_MARK = "linmu.MMATE"  # among `layer_types`, which the base class refuses as well
CARD_MARKER = "<!-- written by linmu when the student was saved -->"
MEASURES = {"accuracy": "accuracy", "kl": "KL, nats", "agreement": "same first choice"}

CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- linmu{base}
---

{ours}

# LinMU student{of}

A {architecture} in whose decoder {converted} of {count} layers hold M-MATE in the place of self-attention: a
bidirectional Mamba2 scan and attention inside 3-D windows (LinMU, arXiv 2601.01322; this is an independent
implementation). Those layers cost linear time, and keep a state of constant size while decoding. The weights
derive from the teacher's; so does their licence.

```python
from linmu import reference

student = reference.load("path or Hub id of this folder")
```

## Settings

```json
{settings}
```

## Numbers

{numbers}
"""


class StudentConfig:
    """Put before a family's configuration: `linmu` is a field, and `config.json` is marked, the object not.

    Args:
        linmu: a student's settings.
        **settings: what the teacher's configuration takes, as it is or as `config.json` holds it.
    """

    def __init__(self, linmu: dict[str, Any] | None = None, **settings: Any) -> None:
        linmu = dict(linmu or {}) or None
        if isinstance(settings.get("text_config"), dict):
            settings["text_config"] = dict(settings["text_config"])
        for part in (settings, settings.get("text_config")):
            if not isinstance(part, dict):
                continue
            if part.get(MARKED) == MARK:
                part[MARKED] = linmu.pop(MARKED)
            if OLD_MARK in (part.get("layer_types") or []):
                del part["layer_types"]  # all alike, as Hugging Face sets them by itself
        super().__init__(**settings)
        self.linmu = linmu

    def to_json_string(self, *args, **kwargs) -> str:
        """Return the configuration as `config.json` has it."""
        settings = json.loads(super().to_json_string(*args, **kwargs))
        if (self.linmu or {}).get("layers"):
            decoder = self.get_text_config(decoder=True)
            part = settings if decoder is self else settings.setdefault("text_config", {})
            settings["linmu"] = self.linmu | {MARKED: getattr(decoder, MARKED, 0.0)}
            part[MARKED] = MARK
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def write_card(student: Any, folder: str | os.PathLike) -> None:
    """Write README.md, unless somebody else wrote one; the numbers are those of the run around the folder."""
    path = Path(folder) / "README.md"
    if path.is_file() and CARD_MARKER not in path.read_text():
        return
    settings = student.config.linmu
    teacher = settings.get("teacher")
    path.write_text(
        CARD.format(
            pipeline="text-generation" if student.prompt_layout is None else "image-text-to-text",
            base=f"\nbase_model: {teacher}" if teacher else "",
            ours=CARD_MARKER,
            of=f" of {teacher}" if teacher else "",
            architecture=type(student).__name__.removeprefix("LinMU"),
            converted=len(settings["layers"]),
            count=student.config.get_text_config(decoder=True).num_hidden_layers,
            settings=json.dumps(settings["options"], indent=1),
            numbers=run_numbers(Path(folder).parent / "results.json"),
        )
    )


def run_numbers(results: Path) -> str:
    """Return the table of a run's results, or a line that says that there are none."""
    if not results.is_file():
        return "None: this student was not measured."
    rows = json.loads(results.read_text())["rows"]
    lines = [f"| | {' | '.join(MEASURES.values())} |", f"|---|{'---|' * len(MEASURES)}"]
    for name, row in rows.items():
        values = (f"{row[key]:.3f}" if key in row else "" for key in MEASURES)
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "On the run's own held-out conversations:\n\n" + "\n".join(lines)


def hub_name(name: str | None) -> str | None:
    """Return a name if it is of the form owner/model, and no folder here: a card names no local paths."""
    is_hub = bool(name) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()
    return name if is_hub else None


def check_folder(folder: str | os.PathLike) -> None:
    """Refuse a local folder that holds another kind of thing than a student, and say where the student is.

    Raises:
        ValueError: for a stage's checkpoint, an adapter, the folder of a run, and a path of nothing
            that cannot be an id of the Hub.
    """
    path = Path(folder)
    where, must = "load", "the folder must hold a student"
    is_path = path.is_absolute() or len(path.parts) > 2 or os.fspath(folder).startswith((".", "~"))
    require(path.is_dir() or not is_path, where, must, f"no folder {path}")
    if not path.is_dir():
        return
    stage = [name for name in ("taught.safetensors", "trainer_state.json") if (path / name).is_file()]
    hint = "a run goes on from it with --resume; the finished student is in the run's folder `student`"
    require(not stage, where, must, f"the checkpoint of a stage in {path}", hint)
    is_adapter = (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()
    hint = "open its student, then peft.PeftModel.from_pretrained(student, folder)"
    require(not is_adapter, where, must, f"a LoRA adapter in {path}", hint)
    is_run = (path / "results.json").is_file() and (path / "student").is_dir()
    require(not is_run, where, must, f"a run in {path}", f"open {path / 'student'}")
    has_config = (path / "config.json").is_file()
    require(has_config, where, must, f"no config.json in {path}", "save it with save_pretrained()")


@contextmanager
def whole_weights(where: str) -> Iterator[None]:
    """Turn what safetensors says of a damaged file into one clear error.

    Raises:
        ValueError: if a file of weights is truncated or otherwise damaged.
    """
    try:
        yield
    except SafetensorError as error:
        must = "the folder's safetensors files must be whole"
        raise ValueError(f"{where}: {must}, got {error}; copy or save the student again") from error
