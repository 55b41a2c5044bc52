"""Triton's CPU interpreter made strict enough to test kernels with, for processes started with
TRITON_INTERPRET=1.

mend_scalars()     loops up to a loaded number, which triton 3.6 does not run on numpy 2
mend_bfloat16()    bfloat16 arithmetic on values instead of bits, and casts that round to nearest
watch_memory()     an error for every access outside the arguments, every write race, every undefined value
patch_once_a_launch()   the same, in two thirds of the time
remember_types()   and in half of that
"""

from .bfloat16 import mend_bfloat16
from .memory import MemoryFaultError, watch_memory
from .patching import patch_once_a_launch
from .scalars import mend_scalars
from .shapes import remember_types

__all__ = [
    "MemoryFaultError",
    "mend_bfloat16",
    "mend_scalars",
    "patch_once_a_launch",
    "remember_types",
    "watch_memory",
]
