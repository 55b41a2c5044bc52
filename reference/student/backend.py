"""Who computes a student: the classes of one package, under one name.

A student holds its `Backend`, chosen when it is made: by `convert(backend=...)`, by the package whose `load`
opens it, or by `from_pretrained(folder, linmu_backend=...)`. Where none of these says it, the variable
LINMU_BACKEND does, and without that the student gets the fastest backend there is. `linmu.reference` and
`linmu.optimized` register themselves; other packages may call `register_backend`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from ..checks import require
from ..layout import VisionLayout
from ..m_mate import MMATE
from ..training.lesson import Lesson
from .context_parallel import Operators

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "LINMU_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A package's classes.

    Args:
        name: what `convert(backend=...)` and LINMU_BACKEND call it.
        MMATE: the block; parameters and their names are the reference's.
        VisionLayout: what it reads the coordinates of tokens from.
        Lesson: teacher and student in one model.
        prepare: called with each new student, to change how its other parts compute.
        operators: what a rank runs on its own tokens of a split prompt.
    """

    name: str
    MMATE: type[MMATE] = MMATE
    VisionLayout: type[VisionLayout] = VisionLayout
    Lesson: type[Lesson] = Lesson
    prepare: Callable[[nn.Module], None] | None = None
    operators: Operators = field(default_factory=Operators)


REFERENCE = Backend("reference")
BACKENDS: dict[str, Backend] = {"reference": REFERENCE}


def register_backend(backend: Backend) -> Backend:
    """Make a backend known by its name, in the place of an earlier one of that name; returns it."""
    BACKENDS[backend.name] = backend
    return backend


def backend_of(wanted: Backend | str | None) -> Backend:
    """Return a backend itself, or by its name; None = what LINMU_BACKEND says, or else the fastest there is.

    Raises:
        ValueError: if no backend has that name.
        RuntimeError: if it is "optimized", which cannot be imported here.
    """
    if isinstance(wanted, Backend):
        return wanted
    if wanted is not None:
        return backend_by_name(wanted, "backend")
    return backend_by_environment(os.environ.get(BACKEND_VARIABLE, ""))


def backend_by_name(name: str, where: str) -> Backend:
    if name == "optimized" and name not in BACKENDS:
        try:
            importlib.import_module("linmu.optimized.student")  # registers itself
        except ImportError as error:
            raise RuntimeError(f"{where}: linmu.optimized must be importable, got: {error}") from error
    known = sorted({*BACKENDS, "optimized"})
    require(name in BACKENDS, where, f"must be one of {', '.join(known)}, or left out", name)
    return BACKENDS[name]


@cache  # so that it is said once
def backend_by_environment(name: str) -> Backend:
    if name:
        logger.info("LinMU runs on linmu.%s, as %s asks.", name, BACKEND_VARIABLE)
        return backend_by_name(name, BACKEND_VARIABLE)
    try:
        backend = backend_by_name("optimized", BACKEND_VARIABLE)
    except RuntimeError as error:
        logger.warning("LinMU runs on linmu.reference, which is slow (%s).", error)
        return REFERENCE
    logger.info("LinMU runs on linmu.optimized.")
    return backend
