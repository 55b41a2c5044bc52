"""Imported where compilations are forked from: what each of them would import and compute anew."""

from triton.backends.nvidia import compiler
from triton.runtime.cache import triton_key

from linmu.optimized import decoding, scan, sliding_window_attention, window_attention  # noqa: F401

triton_key()  # the part of every key of Triton's cache that it hashes hundreds of MB of its own files for
compiler.get_ptxas_version(90)
