"""The processor of a teacher or student, whatever its family."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from .other_processors import OTHER_PROCESSORS
from .qwen_processing import QWEN_PROCESSORS
from .text_processor import TextProcessor

PROCESSORS = QWEN_PROCESSORS | OTHER_PROCESSORS  # of students, by the model_type of their teacher
STOCK_PROCESSORS = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen2_vl": Qwen2VLProcessor}


def load_processor(
    folder: str, *, padding_side: str | None = None, **kwargs: Any
) -> ProcessorMixin | TextProcessor:
    """Open the processor of a teacher or student: with torchvision the stock one, else its twin from here.

    Args:
        folder: local folder or Hub id of a teacher or student.
        padding_side: "left" or "right" for batches; None keeps the folder's.
        **kwargs: as for `from_pretrained`; `gguf_file` for a text decoder in that format.
    Returns:
        a processor whose `apply_chat_template` takes images, and videos as lists of frames or arrays; of a
        text decoder, its tokenizer as a `TextProcessor`.
    Raises:
        ValueError: for a padding side that is neither, and for a folder that has neither.
    """
    if padding_side not in (None, "left", "right"):
        raise ValueError(f"load_processor: padding_side must be 'left' or 'right', got {padding_side!r}")
    folder = str(folder)
    family = (
        PreTrainedConfig.get_config_dict(folder, **kwargs)[0].get("model_type", "").removeprefix("linmu_")
    )
    classes = STOCK_PROCESSORS if is_torchvision_available() else PROCESSORS
    if "gguf_file" in kwargs:  # of text decoders alone
        processor = AutoTokenizer.from_pretrained(folder, **kwargs)
    else:
        processor = classes.get(family, AutoProcessor).from_pretrained(folder, **kwargs)
    if isinstance(processor, PreTrainedTokenizerBase):  # as AutoProcessor gives for a text decoder
        processor = TextProcessor(processor)
    if not isinstance(processor, ProcessorMixin | TextProcessor):
        got = type(processor).__name__
        raise ValueError(f"load_processor: {folder} must hold a processor or a tokenizer, got {got}")
    if padding_side is not None:
        processor.tokenizer.padding_side = padding_side
    return processor
