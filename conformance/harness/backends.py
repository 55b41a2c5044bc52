"""What a backend is: a module that exports the operators, and optionally the modules and losses, of LinMU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .devices import on_device

OPERATORS = (
    "scan_order",
    "inverse_order",
    "window_ids",
    "selective_scan",
    "bidirectional_scan",
    "scan_step",
    "window_attention",
    "sliding_window_attention",
    "causal_conv",
)
OPTIONAL = ("FlexMA", "LocalSwin", "MMATE", "hidden_loss", "logit_loss")
NAMES = OPERATORS + OPTIONAL
OWN = ("linmu.reference", "linmu.optimized")


class Backend:
    """A module under test: its names are attributes, `overrides` replace some of them.

    On another device than the CPU the names of the interface take the tests' tensors there, and bring results
    back.
    """

    def __init__(self, name: str, module: ModuleType, device: str = "cpu", **overrides: Any) -> None:
        self.name, self.module, self.device, self.overrides = name, module, device, overrides
        self.elsewhere: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.overrides:
            return self.overrides[name]
        part = getattr(self.module, name)
        if self.device == "cpu" or name not in NAMES:
            return part
        return self.elsewhere.setdefault(name, on_device(part, self.device))

    @property
    def own(self) -> bool:
        """Whether it is one of this repository's, which must have every name."""
        return self.name.partition("@")[0] in OWN

    def __repr__(self) -> str:
        return self.name

    @property
    def taken_over(self) -> list[str]:
        """Names that another one's backend took from this repository as they are: nothing of it is tested."""
        if self.own:
            return []
        homes = {name: getattr(getattr(self.module, name, None), "__module__", "") or "" for name in NAMES}
        return [name for name, home in homes.items() if home.startswith(OWN)]

    @property
    def missing(self) -> list[str]:
        """Names of the interface that this backend does not export."""
        return [name for name in NAMES if not hasattr(self, name)]

    def describe(self) -> str:
        """One line for the header: what runs, on which engine, and what is not there."""
        engine = "plain torch"
        if hasattr(self.module, "get_engine") and self.own:
            engine = self.module.get_engine(self.device)
        absent = f"; not implemented: {', '.join(self.missing)}" if self.missing else ""
        copied = f"; taken over, not tested: {', '.join(self.taken_over)}" if self.taken_over else ""
        return f"{self.name} (engine: {engine}){absent}{copied}"


def load(name: str) -> Backend:
    """Import a backend by its module name; `module@cuda` computes on the GPU."""
    module, _, device = name.partition("@")
    return Backend(name, importlib.import_module(module), device or "cpu")


def own_backends() -> list[Backend]:
    """The reference, the optimized backend, and the optimized backend on the GPU where there is one."""
    names = [*OWN, f"{OWN[1]}@cuda"] if torch.cuda.is_available() else OWN
    return [load(name) for name in names]


def machine() -> str:
    """Versions and devices that a result depends on."""
    wanted = os.environ.get("LINMU_ENGINE", "not set")
    versions = f"torch {torch.__version__}, triton {triton_version()}, ptxas {ptxas_version()}"
    return f"{versions}, {gpu()}, {torch.get_num_threads()} threads, LINMU_ENGINE {wanted}"


def gpu() -> str:
    """The GPU, its capability and CUDA's version."""
    if not torch.cuda.is_available():
        return "CPU only"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"


def triton_version() -> str:
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"


def ptxas_version() -> str:
    """The assembler that Triton calls: TRITON_PTXAS_PATH, or the one it brings."""
    found = importlib.util.find_spec("triton")
    if found is None:
        return "not installed"
    brought = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    path = os.environ.get("TRITON_PTXAS_PATH", brought)
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return re.search(r"V([\d.]+)", said)[1]
