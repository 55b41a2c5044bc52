"""Students in vLLM: an out-of-tree plugin, found by the entry point `vllm.general_plugins`.

register    (here) tells vLLM of the students' architectures, their settings, and the kind of state they keep
settings    what a student needs of vLLM's configuration; what is refused, and why
scheduler   never ends a chunk inside an image or a video
metadata    which rows of a batch decode, which prefill, and where their states are
positions   M-RoPE's positions with the coordinates of vision tokens in their high bits
tensor_parallel    a block's heads over ranks
layer       an M-MATE block on vLLM's rows of states
prompt_graphs    a lone short prompt from a CUDA graph
warm_up     compiles the Triton kernels of prompts at the start
models      vLLM's models with that layer in the place of attention
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

TESTED = ("0.32.",)  # of vLLM, whose classes the plugin subclasses; on a CPU, with torch 2.13
PARTLY = {  # torch 2.11
    "0.24.": "it was not tried",
    "0.25.": "it was not tried",
    "0.26.": "text and images were tried; videos of Qwen2.5-VL lose their "
    "frames per second there, and with them their positions in time",
}
FOLDER = __name__
MODELS = (  # by the names in a student's config.json
    "LinMUQwen2VLForConditionalGeneration",
    "LinMUQwen2_5_VLForConditionalGeneration",
    "LinMUQwen3VLForConditionalGeneration",
    "LinMUQwen2ForCausalLM",
    "LinMULlamaForCausalLM",
)


def register() -> None:
    """Make `vllm serve FOLDER` open students; vLLM calls this in each of its processes.

    It warns under a version that was tried in part, and says which. Under any other that was not tested it
    warns and registers nothing, so that other models run.
    """
    found = version("vllm")
    if not found.startswith(TESTED):
        partly = [end for start, end in PARTLY.items() if found.startswith(start)]
        end = partly[0] if partly else "none are served; pip install 'linmu[vllm]'"
        message = f"linmu: students are served by vLLM {', '.join(TESTED)}*, got {found}: {end}"
        warnings.warn(message, RuntimeWarning, stacklevel=1)
        if not partly:
            return
    import transformers  # noqa: F401  # AutoConfig learns linmu_*, see linmu/reference/__init__.py
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from .settings import StudentSettings

    register_backend(MambaAttentionBackendEnum.CUSTOM, f"{FOLDER}.metadata.StateBackend", is_mamba=True)
    for name in MODELS:
        MODELS_CONFIG_MAP[name] = StudentSettings
        ModelRegistry.register_model(name, f"{FOLDER}.models:{name}")
