"""Every size and option of an M-MATE block, in one frozen dataclass.

Letters, used in every docstring of the package:
    B batch · L tokens · D model width · H query heads · G key/value groups (head h reads group h // (H/G))
    N state size (= head dim of q and k) · P head dim of v (N = P here) · K taps of the convolution
    (T, Y, X) a grid of vision tokens

Options stand in the order of the equations that read them: those of `flex_ma`, then that of `local_swin`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .checks import require

TEACHER_SIZES = ("width", "heads", "groups", "head_dim", "qkv_bias", "output_bias", "qk_norm", "norm_eps")
SWITCHES = ("scan_rope", "rotary_major", "reverse_scan", "head_norm", "output_gate", "text_only")
RENAMED_OPTIONS = {"backward_scan": "reverse_scan"}  # former names, in folders that were saved with them


@dataclass(frozen=True)
class LinMUConfig:
    """Sizes (those of the teacher's attention) and options (ours) of `FlexMA`, `LocalSwin` and `MMATE`.

    Args:
        width: D, model width.
        heads: H, query heads.
        groups: G, key/value heads; must divide `heads`.
        head_dim: N = P, width of one head; even, for RoPE.
        qkv_bias: whether the teacher's q, k, v projections have biases (Qwen2 family: yes).
        output_bias: whether its output projection has one.
        qk_norm: whether it applies an RMS norm per head to q and k (Qwen3 family: yes).
        norm_eps: added to mean squares before their root.
        scan_rope: flex_ma eq. (1): apply the teacher's RoPE to B and C. Off by default, since Mamba2 has
            none; on in both presets, because the q and k they start from were trained with it (the demo's
            student is right in 0.94 of its questions after stage ii with it, in 0.57 without).
        rotary_major: flex_ma eq. (2): the axis order of the scan rotates with the layer; off = raster order
            (t, y, x) in all layers.
        conv_kernel: flex_ma eq. (2): K, taps of the causal convolution on [x, B, C]; 0 = no convolution.
            Choice: 4, as Mamba2 has; the alternative is none, as attention has.
        half_life: flex_ma eq. (3): tokens after which the fastest- and the slowest-forgetting head have lost
            half of what they wrote, at dt = 1; the other heads are log-spaced between the two. Choice: 64 to
            8192. Mamba2's own start, half-lives from 0.4 to 700 tokens, would forget a picture while reading
            it.
        reverse_scan: flex_ma eq. (4): the right-to-left half of the scan; off = Flex-MA is causal.
        head_norm: flex_ma eq. (5): RMS norm per head after the scan, because the scan, unlike softmax, does
            not normalise its output. Choice: per head, as softmax is; Mamba2's norm is over all heads at
            once.
        output_gate: flex_ma eq. (5): Mamba2's z gate, y * silu(z), initialised so that silu(z) = 1. Off by
            default, because attention has no such gate and it adds D·H·P weights; on in the demo's preset (KL
            0.13 with it after stage ii, 0.17 without).
        window_thw: local_swin eq. (2): the window in tokens (T, Y, X). Choice: (4, 8, 8), a power of 2 near
            Video Swin's (8, 7, 7).
        text_window: local_swin eq. (3): how many tokens a text token attends to, itself and vision included;
            0 = text takes Flex-MA alone, as students saved before there was this option do. Choice: 128; a
            pretrained language model (SmolLM2-135M, teacher's perplexity 11.5) ends at 14.5 with it, at 55
            without, after the same 14 M tokens.
        text_only: leave out the parameters that only vision uses, for decoders that see none: the scan's
            gate, and without a text window Local-Swin and the mix.
    Raises:
        ValueError: if a size is not positive, `heads` is no multiple of `groups`, `head_dim` is odd, or an
            option has a value that it cannot have.
    """

    width: int
    heads: int
    groups: int
    head_dim: int
    qkv_bias: bool = True
    output_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    scan_rope: bool = False
    rotary_major: bool = True
    conv_kernel: int = 4
    half_life: tuple[float, float] = (64.0, 8192.0)
    reverse_scan: bool = True
    head_norm: bool = True
    output_gate: bool = False
    window_thw: tuple[int, int, int] = (4, 8, 8)
    text_window: int = 128
    text_only: bool = False

    def __post_init__(self) -> None:
        where = "LinMUConfig"
        for name in ("width", "heads", "groups", "head_dim"):
            require(getattr(self, name) >= 1, where, f"{name} must be at least 1", getattr(self, name))
        require(
            self.heads % self.groups == 0,
            where,
            "heads must be a multiple of groups",
            f"H={self.heads}, G={self.groups}",
        )
        require(self.head_dim % 2 == 0, where, "head_dim must be even", self.head_dim)
        for name in SWITCHES:
            value = getattr(self, name)
            require(isinstance(value, bool), where, f"{name} must be True or False", repr(value))
        is_count = type(self.conv_kernel) is int and self.conv_kernel >= 0
        require(is_count, where, "conv_kernel must be 0 (none) or a number of taps", repr(self.conv_kernel))
        is_count = type(self.text_window) is int and self.text_window >= 0
        require(is_count, where, "text_window must be 0 (none) or a number of tokens", repr(self.text_window))
        for name in ("window_thw", "half_life"):
            value = getattr(self, name)
            is_several = isinstance(value, Sequence) and not isinstance(value, str)
            require(is_several, where, f"{name} must be a tuple of numbers", repr(value))
            object.__setattr__(self, name, tuple(value))  # JSON gives lists back
        sizes, must = self.window_thw, "window_thw must be three positive sizes (T, Y, X)"
        are_sizes = len(sizes) == 3 and all(type(size) is int and size >= 1 for size in sizes)
        require(are_sizes, where, must, sizes)
        lives, must = self.half_life, "half_life must be two positive token counts"
        are_lives = len(lives) == 2 and all(
            isinstance(each, int | float) and 0 < each < math.inf for each in lives
        )
        require(are_lives, where, must, lives)

    @property
    def has_local_swin(self) -> bool:
        """Whether any token has a local branch."""
        return self.text_window > 0 or not self.text_only

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution's input [x, B, C]: G·P + G·N + H·N."""
        return (2 * self.groups + self.heads) * self.head_dim

    def options(self) -> dict[str, Any]:
        """Return the options by name, as a student's `config.json` has them; its sizes are the teacher's."""
        return {name: value for name, value in asdict(self).items() if name not in TEACHER_SIZES}

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Check options, and return them by their present names: older folders have former ones.

        Args:
            options: values by name, as `options()` gives them or `config.json` holds them.
        Raises:
            ValueError: for a name that does not exist, or an option given by both of its names.
        """
        twice = [pair for pair in RENAMED_OPTIONS.items() if set(pair) <= set(options)]
        require(not twice, "LinMUConfig", "an option must have one of its two names", twice)
        options = {RENAMED_OPTIONS.get(name, name): value for name, value in options.items()}
        known = {field.name for field in fields(cls)} - set(TEACHER_SIZES)
        unknown = sorted(set(options) - known)
        require(not unknown, "LinMUConfig", f"options must be among {sorted(known)}", unknown)
        return options
