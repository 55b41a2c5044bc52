"""Imported where compilations are forked from: what each of them would import and compute anew."""

from triton.backends.nvidia import compiler
from triton.runtime.cache import triton_key

from .preload import kernel_modules

kernel_modules()
triton_key()  # the part of every key of Triton's cache that it hashes hundreds of MB of its own files for
compiler.get_ptxas_version(90)
