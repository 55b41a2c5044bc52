"""The student's parameters that distillation may train, in groups, by their names."""

from __future__ import annotations

from enum import Enum


class ParameterGroup(Enum):
    """A group of trainable parameters; its value is the part of a parameter's name that tells it."""

    FLEX_MA = ".mixer.flex_ma."
    LOCAL_SWIN = ".mixer.local_swin."
    MIX = ".mixer.mix_proj."
    ADAPTERS = "lora_"
    TUNED_MLPS = "modules_to_save"

    def matches(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the group."""
        return self.value in name


MIXER = (ParameterGroup.FLEX_MA, ParameterGroup.LOCAL_SWIN, ParameterGroup.MIX)
MLPS = (ParameterGroup.ADAPTERS, ParameterGroup.TUNED_MLPS)


def belongs(name: str, groups: tuple[ParameterGroup, ...] = (*MIXER, *MLPS)) -> bool:
    """Whether a parameter of this name belongs to one of the groups."""
    return any(group.matches(name) for group in groups)
