"""LinMU in plain PyTorch loops: the code to read, and the oracle of faster backends. Tour: README.md."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .causal_conv import causal_conv
from .config import LinMUConfig
from .flex_ma import FlexMA, FlexMAState
from .layout import VisionLayout, inverse_order, scan_order, window_ids
from .local_swin import LocalSwin
from .losses import hidden_loss, logit_loss
from .m_mate import MMATE, MMATEState
from .scan import bidirectional_scan, scan_step, selective_scan
from .sliding_window_attention import WindowState, sliding_window_attention
from .window_attention import window_attention

if TYPE_CHECKING:
    from .student.convert import convert, load
    from .student.watching import watch
    from .training.calibration import calibrate_norms
    from .training.lesson import Lesson, Objective
    from .training.teacher_student import attach_teacher, detach_teacher

__all__ = [
    "MMATE",
    "FlexMA",
    "FlexMAState",
    "Lesson",
    "LinMUConfig",
    "LocalSwin",
    "MMATEState",
    "Objective",
    "VisionLayout",
    "WindowState",
    "attach_teacher",
    "bidirectional_scan",
    "calibrate_norms",
    "causal_conv",
    "convert",
    "detach_teacher",
    "hidden_loss",
    "inverse_order",
    "load",
    "logit_loss",
    "scan_order",
    "scan_step",
    "selective_scan",
    "sliding_window_attention",
    "watch",
    "window_attention",
    "window_ids",
]

# Imported when first asked for, since they import transformers, which takes seconds.
WITH_TRANSFORMERS = {
    "Lesson": ".training.lesson",
    "Objective": ".training.lesson",
    "attach_teacher": ".training.teacher_student",
    "calibrate_norms": ".training.calibration",
    "convert": ".student.convert",
    "detach_teacher": ".training.teacher_student",
    "load": ".student.convert",
    "watch": ".student.watching",
}


def __getattr__(name: str) -> Any:
    """Import a name of `WITH_TRANSFORMERS` (PEP 562)."""
    if name not in WITH_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(WITH_TRANSFORMERS[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_students() -> None:
    """Make the Auto classes of transformers open students' folders; warn if this transformers cannot."""
    try:
        import_module(".student.families", __name__)
    except ImportError as error:
        message = f"linmu: the Auto classes do not open students' folders: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=1)


class RegisterOnImport(MetaPathFinder):
    """Calls `register_students` at the end of `import transformers`, wherever that is.

    It finds transformers with the other finders of `sys.meta_path` and adds the call to the loader's work.
    """

    asking_others = False

    def find_spec(self, name: str, path=None, target=None):
        """Return the spec of transformers; None for any other module."""
        if name != "transformers" or self.asking_others:
            return None
        self.asking_others = True
        try:
            spec = find_spec(name)
        finally:
            self.asking_others = False
        if spec is not None and spec.loader is not None:
            load_module = spec.loader.exec_module

            def load_and_register(module) -> None:
                load_module(module)
                register_students()

            spec.loader.exec_module = load_and_register
        return spec


if sys.modules.get("transformers"):
    register_students()
else:
    sys.meta_path.insert(0, RegisterOnImport())
