"""What a student needs of vLLM's configuration, and what it refuses."""

from __future__ import annotations

import os

from vllm.config import VllmConfig
from vllm.model_executor.models.config import MambaModelConfig, VerifyAndUpdateConfig

from ....reference.checks import require

WHERE = "linmu in vLLM"
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class StudentSettings(VerifyAndUpdateConfig):
    """Called by vLLM before anything is built."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Choose the settings under which a student gives what generate() gives.

        Raises:
            ValueError: for settings that no student can have, or that were not tested.
        """
        check_settings(vllm_config)
        scheduling = vllm_config.scheduler_config
        scheduling.scheduler_cls = "linmu.optimized.serving.vllm_plugin.scheduler.WholeBlocksScheduler"
        scheduling.async_scheduling = False  # that scheduler is a synchronous one
        scheduling.disable_chunked_mm_input = True  # vLLM then refuses images longer than a step
        vllm_config.model_config.enforce_eager = True  # CUDA graphs of the layer were not tested
        os.environ[RUNNER] = "0"  # the other runner keeps positions in int32, too narrow for `positions`
        MambaModelConfig.verify_and_update_config(vllm_config)


def check_settings(vllm_config: VllmConfig) -> None:
    """Refuse what `StudentSettings` says."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_config.get_text_config()
    converted = len(model.hf_config.linmu["layers"])
    hint = "serve it with python -m linmu.optimized.serving"
    must = "all layers must be converted, hybrids are not yet served"
    got = f"{converted} of {text.num_hidden_layers}"
    require(converted == text.num_hidden_layers, WHERE, must, got, hint)
    must = "prefix caching must be off: a state inside an image is no prefix's state"
    hint = "leave --enable-prefix-caching out"
    require(not vllm_config.cache_config.enable_prefix_caching, WHERE, must, "it on", hint)
    must = "speculation must be off: a recurrent state cannot be rolled back"
    require(vllm_config.speculative_config is None, WHERE, must, "it on", "leave --speculative-config out")
    sizes = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    must = "tensor and pipeline parallel sizes must be 1, others were not tested"
    require(sizes == (1, 1), WHERE, must, sizes, "use --data-parallel-size")
    must = f"{RUNNER} must be 0 or unset"
    require(os.environ.get(RUNNER, "0") == "0", WHERE, must, os.environ.get(RUNNER))
    pruning = getattr(model.multimodal_config, "video_pruning_rate", None)
    require(not pruning, WHERE, "videos must not be pruned: windows need whole grids", pruning)
