"""All modules that define kernels, for processes that others are forked from."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from linmu import optimized


def kernel_modules() -> list[ModuleType]:
    """`linmu.optimized.*.kernels*`, imported: triton reads each kernel's source again, line by line."""
    root = Path(optimized.__file__).parent
    paths = (path.relative_to(root).with_suffix("") for path in sorted(root.rglob("*.py")))
    return [
        import_module(".".join((optimized.__name__, *path.parts)).removesuffix(".__init__"))
        for path in paths
        if any(part.startswith("kernels") for part in path.parts)
    ]
