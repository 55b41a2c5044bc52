"""Imported where trials are forked from: what all of them import, and the faster interpreter."""

import torch._dynamo  # noqa: F401  a first call of a custom operator imports it, which takes a second

from ....harness import module_cases  # noqa: F401
from .patching import patch_once_a_launch
from .shapes import remember_types

patch_once_a_launch()
remember_types()
