"""Imported where programs are forked from: all of them run in the faster interpreter."""

from .patching import patch_once_a_launch

patch_once_a_launch()
