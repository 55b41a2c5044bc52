"""A pretrained model in, a LinMU student out; and a student's folder opened again.

    student = convert(teacher)           attention becomes M-MATE, started from the attention's weights
    student.save_pretrained(folder)      config.json and safetensors, as for any Hugging Face model
    student = load(folder)

    python -m linmu.reference.student.convert --describe ID_OR_DIR    what converting would change

Per converted layer: q, k, v and output projections with their biases go into both branches; the rest of
M-MATE starts as `MMATE.initial_values` says (LinMU, arXiv 2601.01322, and the choices noted there). All
other weights are the teacher's own.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..checks import require
from ..config import LinMUConfig
from ..m_mate import MMATE
from .backend import REFERENCE, Backend, backend_of
from .cost import describe
from .families import FAMILIES, student_class_of
from .model import (
    VERSION,
    LinMUModel,
    attention_by_part,
    decoder_layers,
    mixer_config,
    mixers,
    with_float32_parameters,
)
from .saved_folder import check_folder, hub_name


def convert(
    teacher: PreTrainedModel,
    config: LinMUConfig | Mapping[str, Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    backend: str | Backend | None = None,
) -> LinMUModel:
    """Turn a teacher into a student: a new model, in the teacher's dtype and on its device.

    The teacher stays as it is, and usable. Weights that are not replaced (vision tower, MLPs, embeddings,
    norms) are not copied: each is a parameter of the student over the teacher's memory. Moving or casting one
    model leaves the other alone; training them in place changes both, so `copy.deepcopy` the teacher first if
    it must stay.

    Args:
        teacher: a loaded model of one of the `FAMILIES`, on one device.
        config: options of `LinMUConfig` by name, or a `LinMUConfig` of which the options are taken, not the
            sizes.
        layers: indices of the decoder layers to convert, negative ones from the end; None = all. Others keep
            attention.
        backend: who computes the student: "reference", "optimized", or a `Backend`; None = the package of
            this function.
    Returns:
        the student. A_log, D and the dt, gate and mix projections are at least float32.
    Raises:
        ValueError: for a teacher that is no loaded model of a supported family, options that are unknown or
            cannot be, an unknown backend, or indices out of range.
    """
    require(
        isinstance(teacher, nn.Module), "convert", "teacher must be a loaded model", type(teacher).__name__
    )
    is_config = config is None or isinstance(config, LinMUConfig | Mapping)
    must = "config must be None, a LinMUConfig, or options of it by name"
    require(is_config, "convert", must, type(config).__name__)
    check_adapters(teacher)
    student_class = student_class_of(teacher)
    check_teacher(teacher)
    student = empty_student(teacher, student_class, config, layers, backend_of(backend or REFERENCE))
    for index, mixer in mixers(student).items():
        start_mixer(mixer, decoder_layers(teacher)[index].self_attn)
    share_weights(student, teacher)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def load(folder: str, **from_pretrained_kwargs: Any) -> LinMUModel:
    """Open a student's folder, computed by the package of this function.

    Args:
        folder: local folder or Hub id.
        **from_pretrained_kwargs: as for any Hugging Face model, `dtype` and `device_map` among them;
            `linmu_backend` as for `LinMUModel`.
    Returns:
        the student, in eval mode.
    Raises:
        ValueError: if the folder holds no student, or not exactly a student's tensors.
    """
    hub = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    hub_kwargs = {name: value for name, value in from_pretrained_kwargs.items() if name in hub}
    check_folder(folder)
    settings, _ = PreTrainedConfig.get_config_dict(folder, **hub_kwargs)
    classes = {student.config_class.model_type: student for student in FAMILIES.values()}
    model_type = settings.get("model_type")
    hint = "a vanilla model is opened with its own class and turned into a student by convert()"
    require(model_type in classes, "load", f"model_type must be one of {sorted(classes)}", model_type, hint)
    return classes[model_type].from_pretrained(
        folder, **{"linmu_backend": REFERENCE} | from_pretrained_kwargs
    )


def empty_student(
    teacher: PreTrainedModel,
    student_class: type[LinMUModel],
    config: LinMUConfig | Mapping[str, Any] | None,
    layers: Sequence[int] | None,
    backend: Backend,
) -> LinMUModel:
    """Return the student of a teacher's configuration, on the meta device; only its decoder has an attention
    implementation of its own."""
    attention = decoder_layers(teacher)[0].self_attn
    text_only = {"text_only": student_class.prompt_layout is None}
    options = config.options() if isinstance(config, LinMUConfig) else text_only | dict(config or {})
    settings = {
        "version": VERSION,
        "layers": layer_indices(layers, len(decoder_layers(teacher))),
        "teacher": hub_name(teacher.config._name_or_path),
        "options": jsonable(mixer_config(teacher.config, attention, options).options()),
    }
    given = teacher.config.to_dict()
    kept = {key: value for key, value in given.items() if key not in ("model_type", "architectures")}
    with torch.device("meta"):
        student = student_class(student_class.config_class(**kept, linmu=settings), backend)
    text = attention_by_part(teacher.config)
    if isinstance(text, dict):  # the other parts as the teacher has them
        parts = {
            name: getattr(teacher.config, name)._attn_implementation for name in teacher.config.sub_configs
        }
        student.set_attn_implementation(parts | text)
    return student


def check_teacher(teacher: PreTrainedModel) -> None:
    """Refuse teachers whose weights or attention cannot be taken over as they are."""
    devices = sorted({str(parameter.device) for parameter in teacher.parameters()})
    require(
        len(devices) == 1, "convert", "teacher must be on one device", devices, "load it without device_map"
    )
    kinds = {type(p).__name__ if type(p) is not nn.Parameter else str(p.dtype) for p in teacher.parameters()}
    odd = sorted(kinds - {f"torch.{kind}" for kind in ("float64", "float32", "bfloat16", "float16")})
    hint = "load it without quantization_config; the student can be quantised when it is opened"
    require(not odd, "convert", "teacher must not be quantised", f"weights of {odd}", hint)
    text = teacher.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    full = kinds == {"full_attention"}
    require(full, "convert", "teacher's layers must be full_attention", sorted(kinds), "no sliding windows")


def check_adapters(teacher: nn.Module) -> None:
    """Refuse peft's modules in the place of a model's own: weights alone do not tell what they compute."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapters = sorted({type(part).__name__ for part in teacher.modules() if isinstance(part, kinds)})
    hint = "merge them first: peft.PeftModel.from_pretrained(teacher, folder).merge_and_unload()"
    require(not adapters, "convert", "teacher must hold no adapters", adapters, hint)


def layer_indices(layers: Sequence[int] | None, count: int) -> list[int]:
    """Return sorted indices in [0, count) without repetition; None = all."""
    wanted = range(count) if layers is None else list(layers)
    must = f"layers must be indices from {-count} to {count - 1}"
    in_range = all(isinstance(index, int) and -count <= index < count for index in wanted)
    require(in_range, "convert", must, wanted)
    return sorted({index % count for index in wanted})


def jsonable(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as `config.json` will give them back: lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


@torch.no_grad()
def start_mixer(mixer: MMATE, attention: nn.Module) -> None:
    """Bring a mixer from the meta device to that of an attention layer, in its dtype, and copy the
    weights."""
    weight = attention.q_proj.weight
    with_float32_parameters(mixer.to_empty(device=weight.device).to(weight.dtype))
    mixer.reset_parameters()
    mixer.copy_attention(attention)


def share_weights(student: LinMUModel, teacher: PreTrainedModel) -> None:
    """Replace what is still on the meta device by the teacher's: parameters over its memory, copies of
    buffers."""
    parameters = dict(teacher.named_parameters(remove_duplicate=False))
    buffers = dict(teacher.named_buffers(remove_duplicate=False))
    own = {id(given): shared(given) for given in parameters.values()}  # tied weights stay tied
    started = {id(parameter) for mixer in mixers(student).values() for parameter in mixer.parameters()}
    for name, parameter in [*student.named_parameters(remove_duplicate=False)]:
        if parameter.is_meta and id(parameter) not in started:
            replace(student, name, own[id(parameters[name])])
    for name, buffer in [*student.named_buffers(remove_duplicate=False)]:
        if buffer.is_meta:
            replace(student, name, buffers[name].clone())


def shared(parameter: nn.Parameter) -> nn.Parameter:
    """Return a new parameter over the same memory."""
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, tensor)


def describe_teacher(name: str, layers: Sequence[int] | None = None) -> str:
    """Say what converting a teacher would change: parameters, cache and FLOPs, from its configuration alone.

    Args:
        name: local folder or Hub id; only its config.json is read.
        layers: as for `convert`.
    Raises:
        ValueError: if it is of no supported family, or a student.
    """
    config = AutoConfig.from_pretrained(name)
    kinds = {teacher_class.config_class: teacher_class for teacher_class in FAMILIES}
    must = f"the configuration must be one of {', '.join(kind.__name__ for kind in kinds)}"
    require(type(config) in kinds, "describe", must, type(config).__name__, "a student is no teacher")
    with torch.device("meta"):
        teacher = kinds[type(config)]._from_config(config, dtype=config.dtype or torch.float32)
    return describe(teacher, convert(teacher, layers=layers))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m linmu.reference.student.convert", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--describe", metavar="ID_OR_DIR", required=True, help="a teacher; only its config.json is read"
    )
    print(describe_teacher(parser.parse_args(arguments).describe))


if __name__ == "__main__":
    main()
