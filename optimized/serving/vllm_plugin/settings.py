"""What a student needs of vLLM's configuration, and what it refuses."""

from __future__ import annotations

import os

from vllm.config import CompilationMode, CUDAGraphMode, ModelConfig, VllmConfig
from vllm.model_executor.models.config import MambaModelConfig, VerifyAndUpdateConfig

from ....reference.checks import require
from .tensor_parallel import require_groups_for_ranks

WHERE = "linmu in vLLM"
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
UNTRIED = ("prompt_graphs",)  # names in `--additional-config '{"linmu": [...]}'`


class StudentSettings(VerifyAndUpdateConfig):
    """Called by vLLM before anything is built."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Let vLLM leave prefix caching off unless it is asked for, as it does where no layer attends."""
        say_hybrid(model_config, False)

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Choose the settings under which a student gives what generate() gives.

        Raises:
            ValueError: for settings that no student can have, or that were not tested.
        """
        check_settings(vllm_config)
        scheduling = vllm_config.scheduler_config
        scheduling.async_scheduling = bool(scheduling.async_scheduling)  # if asked for
        kind = "AsyncWholeBlocksScheduler" if scheduling.async_scheduling else "WholeBlocksScheduler"
        scheduling.scheduler_cls = f"{__package__}.scheduler.{kind}"
        scheduling.disable_chunked_mm_input = True  # vLLM then refuses images longer than a step
        choose_graphs(vllm_config)
        os.environ[RUNNER] = "0"  # the other runner keeps positions in int32, too narrow for `positions`
        text = vllm_config.model_config.hf_config.get_text_config()
        say_hybrid(vllm_config.model_config, len(converted_layers(vllm_config)) < text.num_hidden_layers)
        MambaModelConfig.verify_and_update_config(vllm_config)


def choose_graphs(vllm_config: VllmConfig) -> None:
    """Run eagerly, or, where it was asked for, capture steps in which every request decodes.

    Such a graph holds the whole forward, so nothing is compiled and no operator need be split off. Choice:
    off unless asked for, as no GPU has run it.

    Raises:
        ValueError: for another mode: a prefill looks at its pictures on the host.
    """
    compilation, graphs = vllm_config.compilation_config, CUDAGraphMode.FULL_DECODE_ONLY
    given = compilation.cudagraph_mode
    must = "cudagraph_mode must be NONE or FULL_DECODE_ONLY"
    require(given in (None, CUDAGraphMode.NONE, graphs), WHERE, must, given)
    if given == graphs:
        compilation.mode = CompilationMode.NONE
    else:
        vllm_config.model_config.enforce_eager = True


def untried_options(vllm_config: VllmConfig) -> list[str]:
    """Return which of UNTRIED were asked for. Choice: off without that, as no GPU has run them to the end.

    Raises:
        ValueError: for another name.
    """
    asked = list((vllm_config.additional_config or {}).get("linmu", ()))
    unknown = [name for name in asked if name not in UNTRIED]
    must = f"additional_config['linmu'] must be a list of {', '.join(UNTRIED)}"
    require(not unknown, WHERE, must, unknown)
    return asked


def converted_layers(vllm_config: VllmConfig) -> list[int]:
    """Return the indices of the layers that keep states."""
    return vllm_config.model_config.hf_config.linmu["layers"]


def say_hybrid(model_config: ModelConfig, hybrid: bool) -> None:
    """Say whether layers that attend stand beside those that keep states: vLLM asks `layer_types`."""
    count = model_config.hf_config.get_text_config().num_hidden_layers
    model_config.hf_config.layer_types = ["linear_attention" if hybrid else "attention"] * count


def check_settings(vllm_config: VllmConfig) -> None:
    """Refuse what `StudentSettings` says."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    got, hint = "none", "serve the teacher"
    require(converted_layers(vllm_config), WHERE, "a layer at least must be converted", got, hint)
    must = "prefix caching must be off: a state inside an image is no prefix's state"
    hint = "leave --enable-prefix-caching out"
    require(not vllm_config.cache_config.enable_prefix_caching, WHERE, must, "it on", hint)
    must = "speculation must be off: a recurrent state cannot be rolled back"
    require(vllm_config.speculative_config is None, WHERE, must, "it on", "leave --speculative-config out")
    size, hint = parallel.pipeline_parallel_size, "use --tensor-parallel-size or --data-parallel-size"
    require(size == 1, WHERE, "pipeline parallel size must be 1, others were not tested", size, hint)
    groups = model.hf_config.get_text_config().num_key_value_heads
    require_groups_for_ranks(groups, parallel.tensor_parallel_size)
    given = vllm_config.cache_config.mamba_cache_dtype
    must, hint = "mamba_cache_dtype must be auto", "--mamba-ssm-cache-dtype says in what scans are kept"
    require(given == "auto", WHERE, must, given, hint)
    untried_options(vllm_config)
    rounding = getattr(getattr(vllm_config, "mamba_config", None), "enable_stochastic_rounding", False)
    require(not rounding, WHERE, "stochastic rounding must be off: no kernel here rounds so", "it on")
    must, hint = "LoRA must be off", "merge the adapters into the student before it is saved"
    require(vllm_config.lora_config is None, WHERE, must, "it on", hint)
    must = f"{RUNNER} must be 0 or unset"
    require(os.environ.get(RUNNER, "0") == "0", WHERE, must, os.environ.get(RUNNER))
    pruning = getattr(model.multimodal_config, "video_pruning_rate", None)
    require(not pruning, WHERE, "videos must not be pruned: windows need whole grids", pruning)
