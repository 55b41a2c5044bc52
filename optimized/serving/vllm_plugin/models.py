"""vLLM's own models with an M-MATE block in the place of attention.

A student on the meta device, without weights, says what its layers are, where its prompts show pictures, and
which positions its tokens have. Choice: positions are those of transformers, under which a student was
trained. vLLM's own differ: after a video of more frames than rows and columns, text goes on from the last
frame's position there, as in Qwen's first release, and from the largest of height and width in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from ....reference.checks import require
from ....reference.prompts.grids import placement_coords
from ....reference.student.families import FAMILIES
from ....reference.student.generation import MODALITIES, rope_index
from ....reference.student.model import LinMUModel, mixers
from ...engine import engine_of_block
from ...graphs.capture import CudaCapture
from .layer import (
    StateLayer,
    Step,
    check_decodes_are_text,
    prepare_again,
    scan_dtype,
    state_dtypes,
    state_shapes,
)
from .metadata import StateMetadata
from .positions import pack, unpack
from .prompt_graphs import LonePrompt, PromptGraphs
from .settings import untried_options
from .tensor_parallel import part_of_rank, sizes_of_rank
from .warm_up import warm_up

MIXER_WEIGHT = re.compile(r".*\blayers\.(\d+)\.self_attn\.((?:flex_ma|local_swin|mix_proj)\..*)")


def student_of(config) -> LinMUModel:
    """Return the student of a configuration, on the meta device."""
    kinds = {student.config_class: student for student in FAMILIES.values()}
    with torch.device("meta"):
        return kinds[type(config)](config, "optimized")


def state_of(vllm_config: VllmConfig) -> tuple[tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]:
    """Return the shapes and dtypes of a row of states, which all converted layers have alike."""
    config = next(iter(mixers(student_of(vllm_config.model_config.hf_config)).values())).config
    config = sizes_of_rank(config, vllm_config.parallel_config.tensor_parallel_size)
    dtypes = state_dtypes(config, vllm_config.model_config.dtype, scan_dtype(vllm_config))
    return tuple(state_shapes(config).values()), dtypes


class StateModel:
    """What all families share; put before vLLM's class.

    Attributes:
        student: on the meta device.
        states: the converted layers by their index.
    """

    # vLLM's protocols, which as bases would not call `super()`; `say_hybrid` chooses between the last two
    has_inner_state = is_attention_free = is_hybrid = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, layers = vllm_config.model_config.hf_config, self.decoder().layers
        student = student_of(config)
        self.states: dict[int, StateLayer] = {}
        self.prepared: dict[bool, dict] = {}  # see `Step`
        self.is_cold = True
        named = vllm_config.compilation_config.static_forward_context
        for index, mixer in mixers(student).items():
            name = layers[index].self_attn.attn.layer_name
            del named[name]
            sizes = sizes_of_rank(mixer.config, get_tensor_model_parallel_world_size())
            layer = StateLayer(sizes, index, vllm_config, name.removesuffix(".attn"))
            layers[index].self_attn = self.states[index] = layer
        self.has_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        untried = untried_options(vllm_config) if self.has_graphs else ()
        self.stream = torch.cuda.Stream() if self.has_graphs and torch.cuda.is_available() else None
        self.prompt_graphs: PromptGraphs | None = None
        self.rank = get_tensor_model_parallel_rank()
        self.ranks = get_tensor_model_parallel_world_size()
        self.rotary = type(student.get_decoder().rotary_emb)(config.get_text_config())
        object.__setattr__(self, "student", student)  # no module of this one: it has no weights
        adds = getattr(self, "use_deepstack", False)  # features of pictures between layers
        whole = self.ranks == 1 and len(self.states) == len(layers) and not adds
        if "prompt_graphs" in untried and whole:
            given = self.angles, self.decode, self.step_of, self.stream
            self.prompt_graphs = PromptGraphs(CudaCapture, list(self.states.values()), *given)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """As `state_shapes`; vLLM makes the pages of attention as long as those of states."""
        return state_of(vllm_config)[0]

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """As `state_dtypes`."""
        return state_of(vllm_config)[1]

    def decoder(self) -> nn.Module:
        """Return vLLM's decoder, whose `layers` have a `self_attn`."""
        return self.model

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """As vLLM's; tells the layers where the pictures are, which came with the positions."""
        coords = sizes = None
        metadata = get_forward_context().attn_metadata
        if metadata is not None:
            metadata = metadata[next(iter(self.states.values())).name]
        if self.student.prompt_layout is not None and positions.ndim == 2:
            positions, coords, sizes = unpack(positions)
            # a captured step asks the host for nothing: that it holds no picture is the scheduler's care
            decodes = self.has_graphs and metadata is not None and metadata.num_prefills == 0
            coords = coords if not decodes and bool((coords >= 0).any()) else None
        can_capture = self.has_graphs and torch.cuda.is_available()  # without CUDA torch cannot be asked
        is_captured = can_capture and torch.cuda.is_current_stream_capturing()
        if self.prompt_graphs is not None and metadata is not None and not is_captured and coords is None:
            graph = self.graph_for(metadata, positions)
            if graph is not None:
                embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
                return graph(embeds, positions, metadata.state_indices_tensor_p)
        step = self.step_of(self.angles(positions), coords, sizes)
        step.stream = self.stream if is_captured else None
        if metadata is None:  # vLLM measures memory; a step that is captured would do this each time
            prepared = step.prepare(None)
            if self.is_cold and self.engine() == "triton":
                warm_up(step.blocks[0], prepared)
            self.is_cold = False
        for layer in self.states.values():
            layer.step = step
        if metadata is not None:
            check_decodes_are_text(step, metadata.num_decode_tokens)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def graph_for(self, metadata: StateMetadata, positions: Tensor) -> LonePrompt | None:
        """Return the graph of a step's only prompt, of text from its first token on; None = there is none.

        All are captured by the first step that decodes and is not replayed, as vLLM's are when it warms up at
        its start, or else by the first such prompt.
        """
        graphs, tokens = self.prompt_graphs, positions.shape[-1]
        is_alone = metadata.num_prefills == 1 and not metadata.num_decode_tokens and not metadata.past[0]
        if (metadata.num_prefills == 0 or is_alone) and self.engine() == "triton":
            graphs.capture(self.embeddings(), positions)
        return graphs.find(tokens) if is_alone and metadata.num_prefill_tokens == tokens else None

    def embeddings(self) -> Tensor:
        """Return a tensor like embedded tokens, (0, D)."""
        return next(iter(self.states.values())).block.flex_ma.v_proj.weight[:0]

    def engine(self) -> str | None:
        """Return the engine of the blocks."""
        block = next(iter(self.states.values())).block
        return engine_of_block("linmu in vLLM", block.flex_ma.v_proj.weight, block.config.head_dim)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of RoPE, (1, n, N) each, for positions (n,) or (3, n)."""
        return self.rotary(self.embeddings(), positions[..., None, :])

    def step_of(
        self, angles: tuple[Tensor, Tensor], coords: Tensor | None = None, sizes: Tensor | None = None
    ) -> Step:
        """Return what the layers of a forward share."""
        blocks = [layer.block for layer in self.states.values()]
        return Step(angles, coords, sizes, blocks, self.prepared)

    def decode(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Return vLLM's decoder's hidden states, (n, D)."""
        return self.decoder()(None, positions, None, embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM's, which gets what does not belong to a block."""
        wholes = mixers(self.student)
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        loaded = set()

        def others():
            for name, tensor in weights:
                match = MIXER_WEIGHT.fullmatch(name)
                if match is None:
                    yield name, tensor
                    continue
                index, inner = int(match[1]), match[2]
                whole = wholes[index].get_parameter(inner).shape
                same = whole == tensor.shape
                require(same, "load_weights", f"{name} must be {tuple(whole)}", tuple(tensor.shape))
                parameter = self.states[index].block.get_parameter(inner)
                parameter.data.copy_(part_of_rank(inner, tensor, wholes[index].config, self.rank, self.ranks))
                loaded.add(names[id(parameter)])

        loaded |= super().load_weights(others())
        own = {name for name, _ in self.named_parameters() if ".self_attn.block." in name}
        missing = sorted(own - loaded)
        require(not missing, "load_weights", "the folder must hold all of a student", missing[:8])
        prepare_again([layer.block for layer in self.states.values()], self.prepared)
        return loaded


class PictureModel(StateModel):
    """A student that sees."""

    def decoder(self) -> nn.Module:
        """As `StateModel`."""
        return self.language_model.model

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Return a prompt's positions as transformers makes them, with coordinates in their high bits,
        (3, L) int64, and what later tokens' positions are ahead of their index.
        """
        ids = torch.tensor([input_tokens])
        types, inputs = torch.zeros_like(ids), {}
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            start, length = feature.mm_position.offset, feature.mm_position.length
            number, part = MODALITIES.index(feature.modality) + 1, slice(start, start + length)
            placeholder = getattr(self.config, f"{feature.modality}_token_id")
            types[0, part] = number * (ids[0, part] == placeholder)
            for name in (f"{feature.modality}_grid_thw", "second_per_grid_ts"):
                if feature.data.get(name) is not None:
                    inputs.setdefault(name, []).append(torch.as_tensor(feature.data[name].data))
        inputs = {name: torch.stack(values) for name, values in inputs.items()}
        inputs["mm_token_type_ids"] = types
        positions, delta = rope_index(self.student, {"input_ids": ids, **inputs})  # (3, 1, L), (1, 1)
        placements = self.student.placements(ids, inputs) if mm_features else []
        coords = placement_coords(placements, ids.shape, ids.device)
        begins_with_one = bool(coords[0, 0, 0] >= 0) and int((coords[0, :, 0] == coords[0, 0, 0]).sum()) == 1
        must = "a prompt must not begin with a picture of one token"
        require(not begins_with_one, "linmu in vLLM", must, "one", "write something before it")
        return pack(positions[:, 0].long(), coords[0]), int(delta)


class LinMUQwen2VLForConditionalGeneration(PictureModel, Qwen2VLForConditionalGeneration):
    """A Qwen2-VL student."""


class LinMUQwen2_5_VLForConditionalGeneration(PictureModel, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """A Qwen2.5-VL student."""


class LinMUQwen3VLForConditionalGeneration(PictureModel, Qwen3VLForConditionalGeneration):
    """A Qwen3-VL student; vLLM adds DeepStack's features of the pictures between its layers."""

    supports_mm_device_do_normalize = False  # on the device vLLM gives videos the mean and std of images


class LinMUQwen2ForCausalLM(StateModel, Qwen2ForCausalLM):
    """A Qwen2 student, text alone."""


class LinMULlamaForCausalLM(StateModel, LlamaForCausalLM):
    """A Llama student, text alone."""
