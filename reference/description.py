"""What a run says of its student: how every tensor started, what a stage trains, what it leaves alone."""

from __future__ import annotations

STARTS = {
    "flex_ma.q_proj": "copied from the teacher's q_proj, makes C",
    "flex_ma.k_proj": "copied from the teacher's k_proj, makes B",
    "flex_ma.v_proj": "copied from the teacher's v_proj, makes x",
    "flex_ma.o_proj": "copied from the teacher's o_proj",
    "local_swin": "copied from the teacher",
    "flex_ma.dt_proj": "weight 0, bias so that dt = 1",
    "flex_ma.scan_gate_proj": "0: forward and backward scan weigh the same",
    "flex_ma.A_log": "half-lives log-spaced over the heads",
    "flex_ma.D": "0: no skip",
    "flex_ma.conv": "identity",
    "flex_ma.norm_weight": "the teacher's head outputs, root mean square by channel",
    "flex_ma.z_proj": "weight 0, bias so that silu(z) = 1",
    "flex_ma.q_norm": "copied from the teacher",
    "flex_ma.k_norm": "copied from the teacher",
    "mix_proj": "0: both branches weigh the same",
}


def start_of(name: str) -> str:
    """How a tensor of M-MATE was initialised."""
    return next(start for prefix, start in STARTS.items() if name.startswith(prefix))


def part_of(name: str) -> str:
    """The part of the student that a tensor belongs to."""
    if ".mixer." in name:
        return name.split(".mixer.")[1].split(".")[0]
    parts = {
        "lora_": "LoRA",
        ".attention.": "teacher's attention",
        ".visual.": "vision tower",
        ".mlp.": "MLPs",
    }
    return next((part for key, part in parts.items() if key in name), "embeddings, norms and head")
