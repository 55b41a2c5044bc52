"""An M-MATE block on vLLM's rows of states.

Letters: K taps, H heads, G groups, N = P head dim, W text window. A row of the pool holds of one layer

    conv (K, channels), scan (H, N, P), present (W,)    float32; scan as `--mamba-ssm-cache-dtype` says
    keys (W, G, N), values (W, G, P)                    the model's dtype

All but scan are rings: what belongs to a request's t-th token stands at t mod K or t mod W, and a token that
decodes writes where no other reads. `present` says which keys there are, 1 or 0; float32, because vLLM lays a
row's tensors end to end and views each in its dtype. It is filled up to 64 bytes, so that all that is as long
begins where a GPU loads 16 bytes at once. What is empty, K <= 1 or W <= 1, is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ....reference.checks import require
from ....reference.config import LinMUConfig
from ....reference.m_mate import DonatedMMATEState, MMATEState
from ....reference.sliding_window_attention import DonatedWindowState
from ....reference.student.model import with_float32_parameters
from ... import MMATE, VisionLayout
from ...decoding.torch_engine import ring_slots
from ...engine.beside import branches_beside
from ...engine.once import one_forward
from ...m_mate import PooledMMATEState, prepare_layers
from ...projections import join_columns, join_weights
from ...sliding_window_attention import PooledWindowState
from .metadata import StateMetadata
from .positions import check_whole

ALIGNED = 16  # floats
PADDING = 4096  # tokens in a batch of prompts; a GPU takes about as long for them as the host for a pass


def state_shapes(config: LinMUConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a row's tensors by name, in order; what is empty is left out."""
    taps, window = config.conv_kernel, config.text_window
    keys = (window, config.groups, config.head_dim)
    shapes = {
        "conv": (taps, config.conv_channels),
        "scan": (config.heads, config.head_dim, config.head_dim),
        "present": (window + -window % ALIGNED,),
        "keys": keys,
        "values": keys,
    }
    left_out = {"conv"} if taps <= 1 else set()
    left_out |= {"present", "keys", "values"} if window <= 1 else set()
    return {name: shape for name, shape in shapes.items() if name not in left_out}


def state_dtypes(
    config: LinMUConfig, dtype: torch.dtype, scan: torch.dtype = torch.float32
) -> tuple[torch.dtype, ...]:
    """Return their dtypes, in the order of `state_shapes`; `dtype` is the model's, `scan` the scan's."""
    kinds = {"scan": scan, "keys": dtype, "values": dtype}
    return tuple(kinds.get(name, torch.float32) for name in state_shapes(config))


class Step:
    """What the layers of one forward share.

    Args:
        angles: cosines and sines of RoPE, (1, n, N) each.
        coords: (n, 4) int64, as in `VisionLayout`; None = all text.
        sizes: (n,) int64, of how many tokens each one's segment is.
        blocks: of all layers.
        prepared: what follows from their weights, without pictures (True) and with, is found here if it was
            found before, and left here.
    """

    def __init__(
        self,
        angles: tuple[Tensor, Tensor],
        coords: Tensor | None,
        sizes: Tensor | None,
        blocks: Sequence[MMATE] = (),
        prepared: dict[bool, dict[Hashable, Any]] | None = None,
    ) -> None:
        self.angles, self.coords, self.sizes, self.blocks = angles, coords, sizes, blocks
        self.prompts: list[Prompts] | None = None
        self.rows: dict[Hashable, Tensor] = {}
        self.turns: Tensor | None = None
        self.prepared = {} if prepared is None else prepared
        self.of_decodes: dict[Hashable, Any] | None = None
        self.lone: Prompts | None = None  # all there is, of `prompt_graphs`
        self.stream: torch.cuda.Stream | None = None  # of second branches, where this is captured

    def rows_of(self, metadata: StateMetadata, prompts: Prompts | None = None) -> Tensor:
        """Return where the states of the tokens that decode are, or of these prompts, (B,) int64."""
        key = id(metadata), id(prompts)  # both live as long as the step; groups of layers have their own
        if key not in self.rows:
            if prompts is None:
                found = metadata.state_indices_tensor_d[:, 0]
            else:
                found = metadata.state_indices_tensor_p[prompts.which]
            self.rows[key] = found.long()
        return self.rows[key]

    def turns_of(self, metadata: StateMetadata) -> Tensor:
        """Return how many tokens each request has read that decodes, (B,) int64."""
        if self.turns is None:
            self.turns = metadata.seq_lens[: metadata.num_decode_tokens].long() - 1
        return self.turns

    def shared_by_decodes(self) -> dict[Hashable, Any]:
        """Return what the layers have in common for the tokens that decode, for `one_forward`."""
        if self.of_decodes is None:
            self.of_decodes = dict(self.prepare(None))
        return self.of_decodes

    def batches(self, metadata: StateMetadata) -> list[Prompts]:
        """Return the step's prompts, those together that one pass computes.

        Raises:
            ValueError: if one has a part of an image or a video.
        """
        if self.prompts is None:
            starts, past = metadata.starts, metadata.past
            lengths = [end - start for start, end in itertools.pairwise(starts)]
            groups = batches_of(lengths, [each > 0 for each in past])
            self.prompts = [self.prompts_of(group, starts, lengths, past) for group in groups]
        return self.prompts

    def prompts_of(self, which: list[int], starts: list[int], lengths: list[int], past: list[int]) -> Prompts:
        """Return these prompts of the step's as one batch."""
        device, longest = self.angles[0].device, max(lengths[i] for i in which)
        end = torch.tensor([[starts[i + 1] for i in which]]).T
        token = end + torch.arange(-longest, 0)  # (B, L): padded in front, as by generate()
        first = torch.tensor([[starts[i] for i in which]]).T
        padded = any(lengths[i] < longest for i in which)
        there = token >= first
        at = token[there].to(device)
        where = there.flatten().nonzero()[:, 0].to(device) if padded else None  # here, not by the GPU's mask
        valid = there.to(device) if padded else None
        is_run = not padded and which == list(range(which[0], which[-1] + 1))
        run = slice(starts[which[0]], starts[which[-1] + 1]) if is_run else None
        token = token.maximum(first).to(device)
        layout = self.layout([(starts[i], starts[i + 1]) for i in which], token, valid)
        angles = tuple(angle[0, token] for angle in self.angles)
        turns = torch.tensor([[past[i], past[i] + lengths[i]] for i in which]).to(device).unbind(1)
        has_state, shared = past[which[0]] > 0, dict(self.prepare(layout))
        which = torch.tensor(which, device=device)
        return Prompts(which, token, run, at, where, valid, angles, layout, has_state, *turns, shared)

    def prepare(self, layout: VisionLayout | None) -> dict[Hashable, Any]:
        """Return what follows from all layers' weights, for `one_forward`."""
        is_text = layout is None
        if is_text not in self.prepared:
            self.prepared[is_text] = prepared_of(self.blocks, is_text)
            if is_text:
                with one_forward(self.prepared[is_text]):
                    join_weights([block.joined_linears() for block in self.blocks])
                    join_columns([outputs for block in self.blocks if (outputs := block.output_linears())])
        return self.prepared[is_text]

    def layout(
        self, spans: list[tuple[int, int]], token: Tensor, valid: Tensor | None
    ) -> VisionLayout | None:
        """Return the layout of a batch of tokens, (B, L); None = text."""
        if self.coords is None:
            return None
        for start, end in spans:
            check_whole(self.coords[start:end], self.sizes[start:end])
        coords = self.coords[token]
        if valid is not None:
            coords = torch.where(valid[..., None], coords, -1)
        return VisionLayout(coords) if bool((coords >= 0).any()) else None


def prepared_of(blocks: Sequence[MMATE], is_text: bool) -> dict[Hashable, Any]:
    """Return what `prepare_layers` makes, for `one_forward`."""
    found: dict[Hashable, Any] = {}
    if blocks:
        like = blocks[0].flex_ma.v_proj.weight[None]  # (1, L, D)
        with one_forward(found):
            prepare_layers(list(blocks), like, is_text)
    return found


@torch.inference_mode()
def prepare_again(blocks: Sequence[MMATE], prepared: dict[bool, dict[Hashable, Any]]) -> None:
    """Bring what was prepared up to new weights, in its place, from which captured steps read it."""
    for is_text, old in prepared.items():
        for key, new in prepared_of(blocks, is_text).items():
            pairs = zip(
                *([each] if isinstance(each, Tensor) else each for each in (old[key], new)), strict=True
            )
            for mine, fresh in pairs:
                mine.copy_(fresh)


class Prompts(NamedTuple):
    """Prompts of one step, or chunks of them, that one pass computes, padded in front.

    Args:
        which: (B,) int64, of the step's prompts.
        token: (B, L) int64, where each token is among the step's; where there is none, of any.
        run: the same, where they lie side by side without padding; None = they do not.
        at: int64, where those are that there are, in order.
        where: int64, where these are in the flattened batch; None = they are all of it.
        valid: (B, L) bool, where there is one; None = everywhere.
        angles: cosines and sines of RoPE, (B, L, N) each.
        layout: of their pictures; None = text.
        has_state: whether they go on from states.
        before, after: (B,) int64, how many tokens each one has read before this pass, and after it.
        shared: what the layers have in common, for `one_forward`.
    """

    which: Tensor
    token: Tensor
    run: slice | None
    at: Tensor
    where: Tensor | None
    valid: Tensor | None
    angles: tuple[Tensor, Tensor]
    layout: VisionLayout | None
    has_state: bool
    before: Tensor
    after: Tensor
    shared: dict[Hashable, Any]

    def taken(self, tokens: Tensor) -> Tensor:
        """Return their part of a step's (n, D), (B, L, D)."""
        if self.run is None:
            return tokens[self.token]
        return tokens[self.run].unflatten(0, self.token.shape)

    def put(self, output: Tensor, y: Tensor) -> None:
        """Write what came of them, (B, L, D), into a step's (n, D)."""
        y = y.flatten(0, 1)
        if self.run is None:
            output[self.at] = y if self.where is None else y[self.where]
        else:
            output[self.run] = y


def batches_of(lengths: list[int], has_state: list[bool]) -> list[list[int]]:
    """Deal out prompts to batches: those of like lengths together, so that padding stays below PADDING.

    A pass of one short prompt costs the host as much as one of many: on an H200 some 200 ms for 28 layers.
    """
    batches: list[list[int]] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: (has_state[i], -lengths[i])):
        longest = batches[-1][0] if batches else i
        padding += lengths[longest] - lengths[i]
        if batches and has_state[i] == has_state[longest] and padding <= PADDING:
            batches[-1].append(i)
        else:
            batches.append([i])
            padding = 0
    return batches


class StateLayer(MambaBase, nn.Module):
    """The block in the place of a decoder layer's `self_attn`.

    Args:
        config: the sizes and options of this rank's part.
        index: of the decoder layer.
        vllm_config: where vLLM finds the layer by its name.
        name: that name.
    """

    def __init__(self, config: LinMUConfig, index: int, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.block = with_float32_parameters(MMATE(config, index)).requires_grad_(False)
        self.config, self.name, self.dtype = config, name, vllm_config.model_config.dtype
        self.names = list(state_shapes(config))
        self.scan_dtype = scan_dtype(vllm_config)
        self.step: Step | None = None
        self.kv_cache: tuple[Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """As `state_shapes`."""
        return tuple(state_shapes(self.config).values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """In the order of `get_state_shape`."""
        return state_dtypes(self.config, self.dtype, self.scan_dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Whose metadata it gets: `StateBackend`'s."""
        return MambaAttentionBackendEnum.CUSTOM

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Mix the tokens of each request of a batch, (n, D) -> (n, D), and update their rows.

        Raises:
            ValueError: if a request has a part of an image or a video.
        """
        if self.step.lone is not None:
            y = self.compute(self.step.lone, self.step.lone.which, hidden_states)
            return tensor_model_parallel_all_reduce(y[0])
        metadata = get_forward_context().attn_metadata
        cos, sin = self.step.angles
        if metadata is None:  # vLLM measures memory
            y, _ = self.block(hidden_states[None], position_embeddings=(cos, sin))
            return tensor_model_parallel_all_reduce(y[0])
        metadata = metadata[self.name]
        decodes, count = metadata.num_decode_tokens, len(hidden_states)
        output = torch.zeros_like(hidden_states) if decodes < count else None
        if decodes:
            rows, turn = self.step.rows_of(metadata), self.step.turns_of(metadata)
            angles, state = (cos[0, :decodes, None], sin[0, :decodes, None]), self.pooled(rows, turn)
            with one_forward(self.step.shared_by_decodes()), branches_beside(self.step.stream):
                y, _ = self.block(hidden_states[:decodes, None], position_embeddings=angles, state=state)
            if output is None:
                return tensor_model_parallel_all_reduce(y[:, 0])
            output[:decodes] = y[:, 0]
        for prompts in self.step.batches(metadata) if metadata.num_prefills else ():
            prompts.put(output, self.compute(prompts, self.step.rows_of(metadata, prompts), hidden_states))
        return tensor_model_parallel_all_reduce(output)

    def compute(self, prompts: Prompts, rows: Tensor, hidden_states: Tensor) -> Tensor:
        """Mix the tokens of prompts, (n, D) of a step -> (B, L, D), and update their rows, (B,)."""
        with one_forward(prompts.shared), branches_beside(self.step.stream):
            y, state = self.block(
                prompts.taken(hidden_states),
                prompts.layout,
                valid=prompts.valid,
                position_embeddings=prompts.angles,
                state=self.read(rows, prompts.before) if prompts.has_state else None,
            )
        self.write(rows, prompts.after, state)
        return y

    def pooled(self, rows: Tensor, turn: Tensor) -> PooledMMATEState:
        """Return the states in these rows where they are; one token of each request overwrites them there.

        Args:
            rows: (B,) int64.
            turn: (B,) int64, how many tokens each request has read.
        """
        pools = dict(zip(self.names, self.kv_cache, strict=True))
        window = self.no_window(rows)
        if "keys" in pools:
            window = PooledWindowState(pools["keys"], pools["values"], pools["present"], rows, turn)
        return PooledMMATEState(pools.get("conv"), pools["scan"], rows, turn, window)

    def read(self, rows: Tensor, turn: Tensor) -> DonatedMMATEState:
        """Return copies of the states in these rows, which the block may overwrite; arguments as above."""
        pools = dict(zip(self.names, self.kv_cache, strict=True))
        scan = pools["scan"][rows].float()
        conv = scan.new_zeros(len(rows), 0, self.config.conv_channels)
        if "conv" in pools:
            conv = pools["conv"][rows[:, None], ring_slots(turn, self.config.conv_kernel)]
        window = self.no_window(rows)
        if "keys" in pools:
            at = rows[:, None], ring_slots(turn, self.config.text_window)
            window = DonatedWindowState(pools["keys"][at], pools["values"][at], pools["present"][at] > 0)
        return DonatedMMATEState(conv, scan, window)

    def no_window(self, rows: Tensor) -> DonatedWindowState | None:
        """Return the state of a window that holds its token alone; None = there is no window."""
        if not self.config.text_window:
            return None
        shape = len(rows), 0, self.config.groups, self.config.head_dim
        none = torch.zeros(shape, dtype=self.dtype, device=rows.device)
        return DonatedWindowState(none, none, none[:, :, 0, 0] > 0)

    def write(self, rows: Tensor, turn: Tensor, state: MMATEState) -> None:
        """Put states after so many tokens into these rows of the pool."""
        rings = {"conv": state.conv}
        if state.window is not None:
            rings |= {"keys": state.window.k, "values": state.window.v, "present": state.window.present}
        slots = {}
        for name, pool in zip(self.names, self.kv_cache, strict=True):
            if name == "scan":
                pool[rows] = state.scan.to(pool.dtype)
                continue
            size = rings[name].shape[1] + 1
            if size not in slots:
                slots[size] = rows[:, None], ring_slots(turn, size)
            pool[slots[size]] = rings[name].to(pool.dtype)


def scan_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Return the dtype of the scan's states in the pool: vLLM's `mamba_ssm_cache_dtype`, else float32."""
    given = vllm_config.cache_config.mamba_ssm_cache_dtype
    return torch.float32 if given == "auto" else getattr(torch, given)


def check_decodes_are_text(step: Step, decodes: int) -> None:
    """Refuse a picture of one token alone in its chunk: vLLM takes it for a token that was sampled."""
    if step.coords is not None and decodes:
        is_text = not bool((step.coords[:decodes] >= 0).any())
        require(is_text, "linmu in vLLM", "a picture of one token must not come alone", "one")
