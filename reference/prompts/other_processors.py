"""The other families' processors, with or without torchvision: without it, images and text but no videos.

The stock processors refuse to load without torchvision, because of their video part alone. Loaded without
it, they would leave videos out of a prompt and say nothing: these say so.
"""

from __future__ import annotations

import inspect

from transformers import (
    Idefics3Processor,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    ProcessorMixin,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.utils import is_torchvision_available


def student_processor(stock: type[ProcessorMixin], image_stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return the subclass of a stock processor that opens students' folders, under one name everywhere.

    Args:
        stock: the family's processor.
        image_stock: the one that treats images likewise and can do without its video part.
    """
    parent = stock if is_torchvision_available() else image_stock

    signature = inspect.signature(parent.__init__)
    kept = [part for name, part in signature.parameters.items() if name != "video_processor"]

    def __init__(self, *args, **kwargs):  # noqa: N807
        """Take no `video_processor`, so none is loaded: Hugging Face reads what to load off the signature."""
        parent.__init__(self, *args, **kwargs)

    def validate_init_kwargs(processor_config: dict, valid_kwargs):
        """Take the stock processor's settings: Hugging Face reads these off the code of `__init__`."""
        return parent.validate_init_kwargs(processor_config, [part.name for part in kept[1:]])

    def __call__(self, images=None, text=None, videos=None, **kwargs):  # noqa: N807
        """Treat images and text as the stock processor does; refuse videos."""
        if videos is not None:
            must = f"{stock.__name__}: videos must come with torchvision, which reads them, got none"
            raise ValueError(f"{must}; pip install torchvision, or give images")
        return parent.__call__(self, images=images, text=text, **kwargs)

    __init__.__signature__ = signature.replace(parameters=kept)
    own = {
        "__init__": __init__,
        "__call__": __call__,
        "validate_init_kwargs": staticmethod(validate_init_kwargs),
    }
    own = {} if is_torchvision_available() else own
    return type(f"LinMU{stock.__name__}", (parent,), {"__module__": __name__, **own})


LinMUQwen3VLProcessor = student_processor(Qwen3VLProcessor, Qwen3VLProcessor)
LinMULlavaOnevisionProcessor = student_processor(LlavaOnevisionProcessor, LlavaOnevisionProcessor)
LinMUInternVLProcessor = student_processor(InternVLProcessor, InternVLProcessor)
LinMUIdefics3Processor = student_processor(Idefics3Processor, Idefics3Processor)
LinMUSmolVLMProcessor = student_processor(SmolVLMProcessor, Idefics3Processor)

OTHER_PROCESSORS = {
    "qwen3_vl": LinMUQwen3VLProcessor,
    "qwen3_vl_moe": LinMUQwen3VLProcessor,
    "llava_onevision": LinMULlavaOnevisionProcessor,
    "internvl": LinMUInternVLProcessor,
    "idefics3": LinMUIdefics3Processor,
    "smolvlm": LinMUSmolVLMProcessor,
}
