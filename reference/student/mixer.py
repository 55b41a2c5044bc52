"""M-MATE behind the call of a Hugging Face decoder layer.

A decoder layer calls `self_attn` with keywords and wants a pair back. `as_self_attn(MMATE)` is that MMATE
with such a forward: same parameters, same names. It does not use its parent, so PEFT or
`TeacherStudentMixer` may wrap it.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.cache_utils import Cache

from ..checks import require
from ..layout import VisionLayout
from ..m_mate import MMATE
from .cache import cache_slot
from .split_forward import SplitForward

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "block_table")  # of packed rows, that the model did not take
NO_LAYOUT_GIVEN = object()  # not None, which says that the tokens are all text


class SelfAttentionAdapter:
    """Mixin: gives an MMATE class the call signature of a decoder layer's `self_attn`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        linmu_layout: VisionLayout | None = NO_LAYOUT_GIVEN,
        past_key_values: Cache | None = None,
        linmu_sequence: Tensor | None = None,
        linmu_split: SplitForward | None = None,
        **unused,
    ) -> tuple[Tensor, None]:
        """Mix the sequence.

        Args:
            hidden_states: (B, L, D).
            attention_mask: (B, S) bool, True = not padding, of which the last L columns count; None = all
                valid.
            cache: its slot of this layer donates its state and stores the next; None = no decoding.
            position_embeddings: the teacher's (cos, sin), each (B or 1, L, N).
            linmu_layout: where the vision tokens are, from the model's forward; None = all text.
            past_key_values: what older transformers call `cache`.
            linmu_sequence: (B, L) int64, the samples of packed rows, from the model's forward; None = one a
                row.
            linmu_split: how the prompt's tokens are split over processes; None = they are not. If so, the
                layout is the whole prompt's, and hidden states and angles are this rank's.
        Returns:
            (B, L, D) in the dtype of `hidden_states`, and None in the place of attention weights.
        Raises:
            ValueError: if the layout is missing, for packed rows that the model's forward was not told of, or
                for shapes that do not fit.
        """
        require(
            linmu_layout is not NO_LAYOUT_GIVEN,
            "SelfAttentionAdapter",
            "linmu_layout must come from the student's own forward",
            "no such argument",
            "call the whole model, not an inner part of it",
        )
        packing = [name for name in PACKING if unused.get(name) is not None]
        hint = "call the whole model with cu_seq_lens_q, or pad the batch"
        must = "packed rows must come as linmu_sequence"
        require(not packing, "SelfAttentionAdapter", must, packing, hint)
        cache = past_key_values if cache is None else cache
        must, hint = "there must be no cache, as states cannot be exported", "export with use_cache=False"
        require(cache is None or not torch.compiler.is_exporting(), "torch.export", must, "a cache", hint)
        slot = None if cache is None else cache_slot(cache, self.layer_index)
        given = {
            "position_embeddings": position_embeddings,
            "state": None if slot is None else slot.donate(),
        }
        if linmu_split is not None:
            length = linmu_split.length
            y, state = linmu_split.m_mate(self, hidden_states, linmu_layout, **given)
        else:
            length = hidden_states.shape[1]
            y, state = super().forward(
                hidden_states,
                linmu_layout,
                valid=valid_tokens(attention_mask, length),
                sequence=linmu_sequence if linmu_layout is None else None,  # which a layout says itself
                **given,
            )
        if slot is not None:
            slot.store(state, length)
        if shares_gradients():
            y = y + sum_of_nothing(self, linmu_layout).to(y.dtype)
        return y, None

    def __reduce__(self):
        """Pickle by the MMATE class, which a module names, unlike this one."""
        kinds = (kind for kind in type(self).__mro__ if issubclass(kind, MMATE))
        mixer_class = next(kind for kind in kinds if not issubclass(kind, SelfAttentionAdapter))
        return empty_adapter, (mixer_class,), self.__dict__


def shares_gradients() -> bool:
    """Say whether autograd records this forward in one of several processes."""
    return (
        torch.is_grad_enabled()
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


def sum_of_nothing(mixer: MMATE, layout: VisionLayout | None) -> Tensor:
    """Return 0, by which the trained parameters that these tokens do not use get a gradient of 0.

    DDP needs a gradient for every trainable parameter on every rank, and one rank's batch may be text alone.
    """
    unused = [] if mixer.config.reverse_scan and layout is not None else ["flex_ma.scan_gate_proj"]
    unused += ["local_swin", "mix_proj"] if layout is None else []
    parameters = [
        p for name, p in mixer.named_parameters() if name.startswith(tuple(unused)) and p.requires_grad
    ]
    return 0 * sum((p.flatten()[:1].sum() for p in parameters), start=mixer.flex_ma.D.new_zeros(()))


def valid_tokens(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Return the last `length` columns of a (B, S) padding mask, as bool; None stays None."""
    if attention_mask is None:
        return None
    require(
        attention_mask.ndim == 2,
        "SelfAttentionAdapter",
        "attention_mask must be (B, S)",
        tuple(attention_mask.shape),
        'keep the decoder at attn_implementation={"text_config": "linmu"}',
    )
    return attention_mask[:, -length:].bool()


@cache
def as_self_attn(mixer_class: type[MMATE]) -> type[MMATE]:
    """Return the subclass of an MMATE class that a decoder layer can call."""
    name = f"{mixer_class.__name__}AsSelfAttn"
    return type(name, (SelfAttentionAdapter, mixer_class), {"__module__": __name__})


def empty_adapter(mixer_class: type[MMATE]) -> MMATE:
    """Return an adapter that unpickling fills."""
    adapter_class = as_self_attn(mixer_class)
    return adapter_class.__new__(adapter_class)
