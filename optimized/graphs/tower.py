"""A vision tower's forward from CUDA graphs, one for each set of grids: for video, whose frames are alike.

Letters: S patches of all pictures of a call, D width of the tower.

A tower of 32 layers launches over a thousand kernels, for some pictures smaller than what the host needs to
launch them. What follows from the grids alone is found once for each: positions, windows, where sequences
begin. Choice: a graph is captured when grids come again soon, since pictures of ever new sizes would each be
captured, and never run again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from ..engine import say_once
from ..engine.operator import on_device_of
from .graphed_forward import GraphedForward
from .obstacles import arguments, state_of_torch

TOWERS = (Qwen2VisionTransformerPretrainedModel, Qwen2_5_VisionTransformerPretrainedModel)
MOST_PATCHES = 2**14  # of a graph: with more the GPU is slower than the host anyway
MOST_GRIDS = 8  # that are remembered, and captured

Grids = tuple[tuple[int, int, int], ...]  # T, Y, X in patches, of all pictures of a call


@dataclass
class TowerGraph:
    """A captured run of the tower.

    Args:
        pixels: (S, values of a patch), its static buffer.
        constants: what follows from the grids, on which the graph's memory depends.
        replay: runs it.
        output: last hidden states (S, D), and what the decoder is given.
    """

    pixels: Tensor
    constants: dict[str, Tensor]
    replay: Callable[[], None]
    output: tuple[Tensor, Tensor]


class GraphedTower(GraphedForward):
    """The forward of a vision tower, from graphs where nothing watches it; put over the module's own.

    Args:
        module: one of `TOWERS`.
        new_capture: makes what captures, on the tower's device.
    """

    def _start(self) -> None:
        super()._start()
        self.seen: OrderedDict[tuple, None] = OrderedDict()

    def __call__(self, hidden_states: Tensor, grid_thw: Tensor, **given: Any) -> Any:
        """The tower's forward: arguments, result and errors are the same.

        Raises:
            RuntimeError: if a graph cannot be captured or run.
        """
        if torch.compiler.is_compiling():
            return self.eager(hidden_states, grid_thw, **given)
        with self.lock:
            obstacle = self.obstacle(hidden_states, given)
            if obstacle is not None:
                say_once(f"graphs: {obstacle}", f"a forward runs without CUDA graphs: {obstacle}")
            elif len(hidden_states) <= MOST_PATCHES:
                grids = tuple(map(tuple, grid_thw.tolist()))
                key = (grids, hidden_states.dtype)
                if key in self.graphs or self.was_seen(key):
                    return on_device_of(hidden_states, self.run, key, hidden_states)
        return self.eager(hidden_states, grid_thw, **given)

    def obstacle(self, pixels: Tensor, given: dict[str, Any]) -> str | None:
        """Why these arguments cannot run from a graph now; None = they can."""
        watch = self.drop_what_has_changed()
        config = self.module.config
        if pixels.device != next(self.module.parameters()).device:
            return "pixels on another device"
        if config._attn_implementation != "sdpa":
            return f"the tower's attention is {config._attn_implementation}"
        found = state_of_torch(pixels.device) or watch.obstacle()
        return found or arguments(given, set(), config)

    def was_seen(self, key: tuple) -> bool:
        """Whether these grids are among the last `MOST_GRIDS` different ones; now they are."""
        is_known = key in self.seen
        self.seen[key] = None
        self.seen.move_to_end(key)
        while len(self.seen) > MOST_GRIDS:
            self.seen.popitem(last=False)
        return is_known

    def run(self, key: tuple, pixels: Tensor) -> BaseModelOutputWithPooling:
        """The forward from a graph, captured if it is new."""
        with torch.inference_mode(False), torch.no_grad():
            try:
                if key not in self.graphs:
                    while len(self.graphs) >= MOST_GRIDS:
                        self.graphs.popitem(last=False)
                    self.graphs[key] = self.record(key[0], pixels)
                self.graphs.move_to_end(key)
                graph = self.graphs[key]
                graph.pixels.copy_(pixels)
                graph.replay()
                hidden, pooled = (tensor.clone() for tensor in graph.output)
            except Exception as error:
                self.graphs.clear()
                kind = type(error).__name__
                raise RuntimeError(
                    f"accelerate: a vision tower must run from CUDA graphs, got {kind}: {error}; "
                    "linmu.optimized.unaccelerate(student) turns the graphs off"
                ) from error
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def record(self, grids: Grids, pixels: Tensor) -> TowerGraph:
        """Capture the tower over pixels of these grids."""
        grid = torch.tensor(grids, device=pixels.device)
        buffer, constants = pixels.clone(), constants_of(self.module, grid)

        def run() -> tuple[Tensor, Tensor]:
            output = self.eager(buffer, grid, **constants)
            return output.last_hidden_state, output.pooler_output

        if self.capture is None:
            self.capture = self.new_capture()
        return TowerGraph(buffer, constants, *self.capture(run))


def constants_of(tower: nn.Module, grid: Tensor) -> dict[str, Tensor]:
    """What Hugging Face's forward makes of the grids (pictures, 3), as it takes them precomputed."""
    merge = tower.spatial_merge_size
    found = {
        "position_ids": get_vision_position_ids(grid, merge),
        "cu_seqlens": get_vision_cu_seqlens(grid),
    }
    if isinstance(tower, Qwen2_5_VisionTransformerPretrainedModel):
        sizes = {"window_size": tower.window_size, "patch_size": tower.patch_size}
        windows = get_vision_window_index(grid, spatial_merge_size=merge, **sizes)
        found |= dict(zip(("window_index", "cu_window_seqlens"), windows, strict=True))
    return {name: tensor.to(grid.device) for name, tensor in found.items()}


def towers_of(model: nn.Module) -> list[nn.Module]:
    """The vision towers of a model that graphs may run: of `TOWERS`, with plain weights on one device."""
    return [
        module
        for module in model.modules()
        if type(module) in TOWERS
        and {type(each) for each in module.parameters()} == {nn.Parameter}
        and len({each.device for each in module.parameters()}) == 1
    ]
