"""Why a forward cannot run from a graph: each a phrase, said once, before the forward runs as it always did.

A graph knows nothing of what Python would do: a hook, an adapter or another weight put in later would be
passed over in silence. So every call asks; a decoder of 28 layers answers within some 0.1 ms.
"""

from __future__ import annotations

from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import SiLUActivation

from ..engine import get_engine
from ..engine.torch_state import is_observed
from .layers import NORMS

MEMBERS = ("_modules", "_parameters", "_buffers")
# What these compute follows from the members they have: another one changes nothing.
LEAVES = {nn.Linear, nn.Embedding, nn.SiLU, SiLUActivation, *NORMS}
CAPTURING = "transformers.utils.output_capturing"
OBSERVED = "torch.compile, a mode or a transform observes it, or LINMU_SHORTCUTS=0"


class Watch:
    """What a captured decoder was made of, and whether it still is.

    Args:
        decoder: whose modules are watched.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.modules = [module for module in decoder.modules() if module is not decoder]
        self.spaces = [vars(module) for module in self.modules]
        everything = [vars(decoder), *self.spaces]
        parts = [space[kind] for space in everything for kind in MEMBERS]
        self.filled = [part for part in parts if part]
        self.members = [*map(dict, self.filled)]
        open_to_more = [decoder, *(module for module in self.modules if type(module) not in LEAVES)]
        parts = [vars(module)[kind] for module in open_to_more for kind in MEMBERS]
        self.empty = [part for part in parts if not part]
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        self.hooks = [space[kind] for space in everything for kind in kinds]
        self.handles = -1  # of hooks that there were in torch when these were last found to do nothing
        self.kind = kind_of(self.modules)
        self.scalars = [
            (part, name, value)
            for part in self.filled
            for name, value in part.items()
            if isinstance(value, Tensor) and value.numel() == 1
        ]
        self.tensors = [*decoder.parameters(), *decoder.buffers()]
        self.pointers = [*map(Tensor.data_ptr, self.tensors)]
        self.patched = [space for space in self.spaces if "forward" in space]
        self.forwards = [space["forward"] for space in self.patched]

    def has_same_members(self) -> bool:
        """Whether the decoder's modules and tensors are the same objects. Comparing dictionaries does this in
        one call, as they ask about equality only where objects differ: most tensors then refuse to answer.
        """
        try:
            same = self.filled == self.members
        except RuntimeError:
            return False
        return same and all(part[name] is value for part, name, value in self.scalars)

    def has_changed(self) -> bool:
        """Whether modules, tensors, their memory, or forwards put over modules are other ones."""
        same = (
            self.has_same_members()
            and not any(self.empty)
            and self.pointers == [*map(Tensor.data_ptr, self.tensors)]
            and sum(map(contains, self.spaces, repeat("forward"))) == len(self.patched)
            and all(
                space.get("forward") is own for space, own in zip(self.patched, self.forwards, strict=True)
            )
        )
        return not same

    def obstacle(self) -> str | None:
        """What in the decoder follows its calls, or changes with them."""
        every = nn.modules.module  # hooks of all modules
        if every._global_forward_hooks or every._global_forward_pre_hooks or self.has_hooks():
            return "hooks on its modules"
        return self.kind

    def has_hooks(self) -> bool:
        """Whether hooks on modules do anything. Torch numbers the hooks that are put on modules: as long as
        there was no other one, there is none here.
        """
        handles = RemovableHandle.next_id
        if handles == self.handles:
            return False
        found = any(self.hooks) and any(map(watches, self.hooks))
        if not found:
            self.handles = handles
        return found


def watches(hooks: dict[int, Any]) -> bool:
    """Whether some of a module's hooks do anything: Hugging Face leaves its own there after hidden states
    were asked for once, and they sleep until they are asked for again.
    """
    return any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks.values())


def kind_of(modules: list[nn.Module]) -> str | None:
    """Modules that change what they do from call to call."""
    for module in modules:
        if hasattr(module, "active_adapters"):  # of PEFT
            return "adapters that are not merged (merge_and_unload() makes them weights)"
        if hasattr(module, "_hf_hook"):  # of accelerate
            return "weights that are offloaded"
    return None


def state_of_torch(device: torch.device) -> str | None:
    """What of torch's state asks for an eager forward."""
    if torch.is_grad_enabled():
        return "gradients are recorded (torch.no_grad() turns that off)"
    if is_observed():
        return OBSERVED
    return "autocast" if torch.is_autocast_enabled(device.type) else state_of_device(device)


def state_of_device(device: torch.device) -> str | None:
    """What of a device's state asks for no graph; None on a CPU, where a stand-in may capture."""
    if device.type != "cuda":
        return None
    if get_engine(device) != "triton":
        return "the torch engine"
    return "another capture" if torch.cuda.is_current_stream_capturing() else None


# Answered above, or nothing to a decoder.
IGNORED = {"linmu_layout", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict"}


def arguments(given: dict[str, Any], known: set[str], config: Any) -> str | None:
    """Arguments that a graph has no place for."""
    for name in ("output_attentions", "output_hidden_states"):
        asked = given.get(name)
        if getattr(config, name, False) if asked is None else asked:
            return name
    if given.get("return_dict") is False:
        return "return_dict=False"
    other = sorted(name for name, value in given.items() if name not in known | IGNORED and value is not None)
    return f"the arguments {', '.join(other)}" if other else None
