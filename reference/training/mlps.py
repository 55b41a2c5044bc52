"""The decoder's MLPs in stage iii: adapters, or tuned copies, beside the teacher's own."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES  # peft's own word for none
from torch import nn
from transformers import PreTrainedModel, set_seed

from .config import MLPSettings
from .parameter_groups import MLPS, belongs
from .refusal import check
from .safety.memory import leave_inputs_alone


def add_adapters(student: PreTrainedModel, settings: MLPSettings, seed: int) -> PeftModel:
    """Put adapters or tuned copies into a student, in place, kept in float32.

    Returns:
        what `merge_and_unload` gives the student back from.
    Raises:
        RefusedError: as of `peft_settings`.
    """
    set_seed(seed)
    adapted = get_peft_model(student, peft_settings(student, settings))
    leave_inputs_alone(student)
    for name, parameter in student.named_parameters():
        if belongs(name, MLPS):
            parameter.data = parameter.data.float()
    return adapted


def peft_settings(student: nn.Module, settings: MLPSettings) -> LoraConfig:
    """What peft is to do with the decoder's MLPs: adapters, or tuned copies beside the teacher's own.

    Raises:
        RefusedError: if a layer has no linear projection of the names that adapters are asked for.
    """
    layers = [*student.get_decoder().layers]
    names = {id(module): name for name, module in student.named_modules()}
    if settings.tune == "full":
        mlps = [names[id(layer.mlp)] for layer in layers]
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=mlps)
    targets = []
    for layer in layers:
        linear = [name for name, module in layer.mlp.named_modules() if isinstance(module, nn.Linear)]
        wanted = [name for name in linear if name.split(".")[-1] in settings.lora_targets]
        mlp = names[id(layer.mlp)]
        given = " ".join(settings.lora_targets)
        check(
            wanted,
            f"--lora_targets must be among the linear projections of {mlp}, {linear or 'which has none'}",
            given,
            "a mixture of experts takes --tune full or --tune none",
        )
        targets += [f"{mlp}.{name}" for name in wanted]
    return LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=targets)
