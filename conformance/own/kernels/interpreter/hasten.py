"""Imported where trials are forked from: what all of them import, and the faster interpreter."""

import torch._dynamo  # noqa: F401  a first call of a custom operator imports it, which takes a second
from triton.runtime.interpreter import InterpretedFunction

from ....harness import module_cases  # noqa: F401
from .patching import patch_once_a_launch
from .preload import kernel_modules
from .shapes import remember_types

patch_once_a_launch()
remember_types()
for module in kernel_modules():
    for value in list(vars(module).values()):
        if isinstance(value, InterpretedFunction):
            value.rewrite()  # as its first launch does, which it then need not
