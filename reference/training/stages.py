"""What each of the three stages trains, on what, and how fast (LinMU, arXiv 2601.01322).

    i    Flex-MA and the gates learn to mix as attention does, layer by layer, on the teacher's hidden states
    ii   Local-Swin learns too; first on the teacher's hidden states, then on the student's own
    iii  all of M-MATE, and adapters on the decoder's MLPs, learn the teacher's answers, end to end

Weights of the losses and whose hidden states come first: Choice, tried on the bundled teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import STAGES, Config
from .lesson import Objective
from .parameter_groups import MLPS, ParameterGroup

FLEX_MA, LOCAL_SWIN, MIX, ADAPTERS, TUNED_MLPS = ParameterGroup
TRAINED = {"i": (FLEX_MA, MIX), "ii": (FLEX_MA, LOCAL_SWIN, MIX), "iii": (FLEX_MA, LOCAL_SWIN, MIX)}
MLPS_OF = {"lora": (ADAPTERS,), "full": (TUNED_MLPS,), "none": ()}


@dataclass(frozen=True)
class Stage:
    """What a stage trains, on what, and how fast.

    Args:
        name: i, ii or iii.
        trained: groups of parameters.
        objectives: each for an equal share of the steps.
        learning_rate: of M-MATE's tensors that were copied from the teacher.
        learning_rate_new: of its others.
        mlp_learning_rate: of adapters and tuned MLPs.
    """

    name: str
    trained: tuple[ParameterGroup, ...]
    objectives: tuple[Objective, ...]
    learning_rate: float
    learning_rate_new: float
    mlp_learning_rate: float = 0.0

    @property
    def trains_mlps(self) -> bool:
        """Whether the decoder's MLPs are adapted or tuned."""
        return any(group in MLPS for group in self.trained)


def stage_of(name: str, config: Config) -> Stage:
    """A stage as the settings have it."""
    settings = config.of_stage(name)
    objectives = tuple(
        Objective(
            settings.mixer, settings.layer, settings.logits, inputs, settings.end_to_end, settings.temperature
        )
        for inputs in settings.inputs
    )
    trained = branches_of(TRAINED[name], config.student.branches)
    if name == "iii":
        trained += MLPS_OF[config.mlps.tune]
    new = settings.learning_rate if settings.learning_rate_new is None else settings.learning_rate_new
    return Stage(name, trained, objectives, settings.learning_rate, new, config.mlps.mlp_learning_rate)


def branches_of(trained: tuple[ParameterGroup, ...], branches: str) -> tuple[ParameterGroup, ...]:
    """The groups that a stage trains where one branch is left out. Choice: Local-Swin alone starts in i."""
    if branches == "both":
        return trained
    return (FLEX_MA,) if branches == "flex" else (LOCAL_SWIN,)


def steps_before(name: str, config: Config) -> int:
    """Optimizer steps of the stages before one."""
    return sum(config.of_stage(before).steps for before in STAGES[: STAGES.index(name)])
