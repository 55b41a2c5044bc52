"""What a backend is: a module that exports the operators, and optionally the modules and losses, of LinMU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch

OPERATORS = (
    "scan_order",
    "inverse_order",
    "window_ids",
    "selective_scan",
    "bidirectional_scan",
    "scan_step",
    "window_attention",
    "causal_conv",
)
OPTIONAL = ("FlexMA", "LocalSwin", "MMATE", "hidden_loss", "logit_loss")
NAMES = OPERATORS + OPTIONAL
OWN = ("linmu.reference", "linmu.optimized")


class Backend:
    """A module under test: its names are attributes, `overrides` replace some of them."""

    def __init__(self, name: str, module: ModuleType, **overrides: Any) -> None:
        self.name, self.module, self.overrides = name, module, overrides

    def __getattr__(self, name: str) -> Any:
        if name in self.overrides:
            return self.overrides[name]
        return getattr(self.module, name)

    def __repr__(self) -> str:
        return self.name

    @property
    def missing(self) -> list[str]:
        """Names of the interface that this backend does not export."""
        return [name for name in NAMES if not hasattr(self, name)]

    def describe(self) -> str:
        """One line for the header: what runs, on which engine, and what is not there."""
        engine = getattr(self.module, "get_engine", lambda: "plain torch")()
        absent = f"; not implemented: {', '.join(self.missing)}" if self.missing else ""
        return f"{self.name} (engine: {engine}){absent}"


def load(name: str) -> Backend:
    """Import a backend by its module name."""
    return Backend(name, importlib.import_module(name))


def own_backends() -> list[Backend]:
    """The reference, and the optimized backend as soon as it exports anything of the interface."""
    oracle, optimized = map(load, OWN)
    return [oracle] if len(optimized.missing) == len(NAMES) else [oracle, optimized]


def machine() -> str:
    """Versions and devices that a result depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    wanted = os.environ.get("LINMU_ENGINE", "not set")
    return f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, LINMU_ENGINE {wanted}"
