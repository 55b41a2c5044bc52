"""A teacher's model and processor, by the name that `--teacher` gives."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GgufConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import find_adapter_config_file

from ..prompts.processors import load_processor
from ..prompts.text_processor import TextProcessor
from .refusal import RefusedError, check

# What transformers raises for a model that is not there, that is broken, or that another package must read.
NOT_OPENED = (ValueError, OSError, ImportError, struct.error)


def open_teacher(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, a Hub id, or a GGUF file, whose packed weights are unpacked.

    Raises:
        NOT_OPENED: as transformers has them.
    """
    folder, file = where_is(name)
    takes_pictures = type(AutoConfig.from_pretrained(folder, **file)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if takes_pictures else AutoModelForCausalLM
    if not file:
        return auto_class.from_pretrained(folder, dtype=dtype)
    unpacked = GgufConfig(dequantize=True)
    return auto_class.from_pretrained(folder, dtype=dtype, quantization_config=unpacked, **file)


def open_processor(name: str) -> ProcessorMixin | TextProcessor:
    """The processor beside the model, padding on the right.

    Raises:
        RefusedError: for adapters in the place of a model.
        NOT_OPENED: as transformers has them.
    """
    folder, file = where_is(name)
    adapters = None if file else find_adapter_config_file(folder)
    must, hint = "--teacher must hold no adapters", "merge them first, by peft's merge_and_unload"
    check(not adapters, must, adapters, hint)
    return load_processor(folder, padding_side="right", **file)


def where_is(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is given: a folder or Hub id, and the GGUF file in it if one is meant.

    Raises:
        RefusedError: for such a file that is not there, unless it may be on the Hub, as OWNER/NAME/FILE.gguf.
    """
    path = Path(name)
    if path.suffix != ".gguf":
        return name, {}
    may_be_on_hub = not path.parent.is_dir() and re.fullmatch(r"[\w-][^/]*/[^/]+/.+", name)
    check(path.is_file() or may_be_on_hub, "--teacher must be a file that is there", name)
    return str(path.parent), {"gguf_file": path.name}


@contextmanager
def refused_as_teacher(name: str) -> Iterator[None]:
    """Turn what is said of a teacher that cannot be opened or converted into a refusal that names it."""
    try:
        yield
    except RefusedError:
        raise
    except NOT_OPENED as error:
        must = "--teacher must be a model that can be converted"
        raise RefusedError(f"distill: {must}, got {name}: {error}") from error
