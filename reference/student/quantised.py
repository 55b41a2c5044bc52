"""Students whose matrices are rounded to 8 or 4 bits when they are opened: which, and in how many bytes.

    load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))

Rounded are the weights of linear layers: the projections of both branches of M-MATE, the MLPs, the vision
tower. Precise stay, by `FLOAT32_PARAMETERS` in `model.py`, A_log, D and the dt, gate and mix projections;
and, as in every model of transformers, norms, convolutions, biases, embeddings and the output head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from ..checks import require


def bitsandbytes_8(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Weights in 8 bits, and inputs rounded to 8 bits but for their outliers (LLM.int8, arXiv 2208.07339)."""
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Weights in NF4, 4 bits (QLoRA, arXiv 2305.14314)."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def torchao(name: str) -> Callable[[torch.dtype], TorchAoConfig]:
    """A configuration of torchao by its name there."""

    def configuration(dtype: torch.dtype) -> TorchAoConfig:
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, name)())

    return configuration


def torchao_fp8_inputs(dtype: torch.dtype) -> TorchAoConfig:
    """Weights and inputs in fp8.

    Raises:
        ValueError: without a GPU that multiplies fp8.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    must = "fp8 inputs must have a GPU of compute capability 8.9 or more"
    require(capability is not None and capability >= (8, 9), "torchao", must, capability)
    return torchao("Float8DynamicActivationFloat8WeightConfig")(dtype)


QUANTISERS: dict[str, Callable[[torch.dtype], Any]] = {  # configurations, by the dtype to compute in
    "bitsandbytes, 8 bits": bitsandbytes_8,
    "bitsandbytes, 4 bits": bitsandbytes_4,
    "torchao, int8": torchao("Int8WeightOnlyConfig"),
    "torchao, int8, inputs too": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao, fp8": torchao("Float8WeightOnlyConfig"),
    "torchao, fp8, inputs too": torchao_fp8_inputs,
}


def quantised_weights(model: PreTrainedModel) -> list[str]:
    """The names of the parameters that hold fewer bits than the model computes with."""
    return [name for name, parameter in model.named_parameters() if type(parameter) is not nn.Parameter]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once, with the scales of quantised ones."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found |= {id(part): part for part in parts_of(tensor)}
        scales = getattr(getattr(module, "state", None), "SCB", None)  # of 8 bits, after the first forward
        found |= {} if scales is None else {id(scales): scales}
    return sum(part.numel() * part.element_size() for part in found.values())


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors in which a parameter is kept: itself, or its integers and their scales."""
    if is_traceable_wrapper_subclass(tensor):  # torchao
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts_of(getattr(tensor, name))
        return
    yield tensor
    if (state := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes' 4 bits
        yield from (part for part in state.as_dict().values() if isinstance(part, Tensor))
    if (scales := getattr(tensor, "SCB", None)) is not None:  # its 8 bits
        yield scales


def summary(model: PreTrainedModel) -> str:
    """One sentence on what is rounded, and what it costs."""
    names = quantised_weights(model)
    kinds = sorted({name.rsplit(".", 2)[-2] for name in names if "visual" not in name.split(".")})
    size = f"{weight_bytes(model) / 2**20:.1f} MiB"
    method = model.hf_quantizer.quantization_config.quant_method.value
    count = sum(1 for _ in model.parameters())
    return f"{method}: {len(names)} of {count} weights are quantised ({', '.join(kinds)}), {size} in all"


def refuse_not_finite(model: PreTrainedModel) -> None:
    """Refuse weights that a quantiser could not round: torchao divides a row of zeros in fp8 by its scale, 0.

    Raises:
        ValueError: naming the modules.
    """
    modules = set()
    for name in quantised_weights(model):
        parts = (part for part in parts_of(model.get_parameter(name)) if part.is_floating_point())
        if not all(part.is_meta or part.float().isfinite().all() for part in parts):
            modules.add(name.rsplit(".", 2)[-2])
    got, names = f"NaN in {sorted(modules)}", [f".*{module}" for module in sorted(modules)]
    hint = f"fp8 has no scale for rows of zeros; leave them precise: modules_to_not_convert={names}"
    require(not modules, "load", "quantised weights must be finite", got, hint)


def refuse_packed(model: nn.Module) -> None:
    """Refuse to save what could not be opened again.

    On CPUs with bfloat16 instructions the first forward of bitsandbytes' 4-bit layers packs their weights
    anew; taking them back for a state dict leaves the scales in the other order (seen in 0.50.2).

    Raises:
        ValueError: if there are such weights.
    """
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    packed = sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states)
    must = "4-bit weights must be as they were opened"
    hint = "open the student again and save it before it computes, or on a GPU"
    require(not packed, "save_pretrained", must, f"{packed} packed for this CPU", hint)
