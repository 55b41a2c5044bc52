"""Compile one Triton kernel of linmu.optimized for sm_90 and print what it takes, as JSON. No GPU, no driver.

python compile_sm90.py KERNEL DTYPE:SIZE,SIZE...    like output bf16:128,64 fp32:128
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linmu.optimized.decoding.kernels import text_step as text_step_kernels
from linmu.optimized.layout import plan as window_plan
from linmu.optimized.scan.kernels import output as scan_output
from linmu.optimized.scan.kernels import states as scan_states
from linmu.optimized.scan.kernels import tiles as scan_tiles
from linmu.optimized.sliding_window_attention import kernels as sliding
from linmu.optimized.sliding_window_attention import kernels_backward as sliding_backward
from linmu.optimized.sliding_window_attention import kernels_ring as sliding_ring
from linmu.optimized.sliding_window_attention import kernels_step as sliding_step
from linmu.optimized.window_attention import kernels as window_kernels
from linmu.optimized.window_attention import kernels_backward as window_gradients

# fmt: off
FLOAT32 = {
    "A", "A_GRAD", "BIAS_GRAD", "CHUNK_DECAY", "D", "DELTA", "DELTA_AT", "DT", "DT_GRAD", "FACTOR", "FINAL",
    "FINAL_GRAD", "GATE", "GATES", "GATE_GRAD", "LEAVING", "LSE", "LSE_AT", "NEW_STATE", "PAIR_DT",
    "PAIR_GATE", "PRODUCT", "READ_DECAY", "RUN_DECAY", "SKIP_GRAD", "START", "STATES", "SUMS", "TIME_STEP",
    "WEIGHT_GRAD", "WRITE_WEIGHT",
}
FLOAT32 |= {
    f"{direction}_{name}"
    for direction in ("FORWARD", "REVERSE")
    for name in (
        "SUM", "GATE", "SPANS", "CHUNK_DECAY", "STATE_PRODUCT", "READ_DECAY", "READ_PRODUCT", "WRITE_WEIGHT",
        "WRITE_PRODUCT",
    )
}
# fmt: on
INT64 = {"IDS", "TOKEN", "WINDOW", "FIRST", "LAST", "RANK", "PLACE", "ORDER", "COUNT", "OPENS", "ROW"}
INT32 = {"SEGMENT", "BEGIN", "BEGINS", "AGE"}
MASKS = {"VALID", "MASK", "ASKS"}
LINEAR = re.compile(r"tensor<(\d+)x(\d+)x[a-z0-9]+, #linear")  # tiles, not scalars of tokens
FLOATS = {"scale", "natural_scale", "inverse", "eps"}
STRIDES = ("batch", "token", "head", "gap")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCAN = {"HEADS": 28, "RATIO": 7, "HAS_VALID": True, "HAS_VISION": True, "HAS_SKIP": True}
SCAN |= {"HAS_ORDER": True, "HAS_NORM": True, "SAVES_Y": True, "HAS_SEQUENCE": False}
SWEEP = {"REVERSED": 1, "STARTS": True, "LEAVES": True}
GRADIENT = {"gradient": True}
CONV = {
    "CHANNELS": 4608,
    "STATES": 4608,
    "TAPS": 4,
    "BEFORE": 4,
    "ROWS": 32,
    "COLUMNS": 64,
    "HAS_MASK": True,
    "HAS_ORDER": True,
    "HAS_SEQUENCE": False,
    "HAS_BIAS": True,
    "HAS_START": True,
    "SCALES": True,
}
WINDOW = {"HEADS": 28, "RATIO": 7, "FLAT": True, "BLOCK": window_plan.BLOCK, "KEYS": 256}
TOKEN = {"HEADS": 28, "RATIO": 7, "TAPS": 4, "ROWS": 4, "HAS_BIAS": True, "HAS_NORM": True, "HAS_Z": True}
TOKEN |= {"HAS_VALID": True, "IS_POOLED": False, "IS_RING": False, "HAS_LOGIT": False, "programs": 28}
POOLED_TOKEN = TOKEN | {"IS_POOLED": True, "IS_RING": True, "HAS_LOGIT": True, "programs": 7168}
PROJECT = {"WIDTH": 3584, "HEADS": 28, "GROUPED": 512, "INNER": 3584, "HAS_BIAS": True, "HAS_Z": True}
OUTPUT = {"WIDTH": 3584, "HAS_BIAS": True, "OUTPUTS": text_step_kernels.OUTPUTS_AT_ONCE}
MIX = {"WIDTH": 3584, "BLOCK": 1024}
ROPE = {"HEADS": 28, "BLOCK_HEADS": 32, "BACKWARD": True, "TAKES": True}
SLIDING = {"HEADS": 28, "RATIO": 7, "HAS_ASKS": True, "HAS_VALID": True, "HAS_LOW": True}
SLIDING_STEP = {"GROUPS": 4, "RATIO": 7, "PLACES": 127, "HAS_ASKS": True, "HAS_VALID": True}
RING = SLIDING_STEP | {"PLACES": 128, "HEADS": 16, "HAS_LOGIT": True}
PLAN = dict.fromkeys(("TOKEN", "WINDOW", "BLOCKS"), "*i32")
SPANS = dict.fromkeys(("LOW", "HIGH"), "*i32")
LOSS = {"SIZE": 151_936, "BLOCK": 2048, "HAS_MASK": True}

TOKEN_POINTERS = dict.fromkeys(("STATE", "NEXT", "RATE", "A_LOG", "WEIGHT", "BIAS", "NORM"), "*fp32")
NORM = {"WIDTH": 3584, "BLOCK": 4096, "HAS_MORE": True}
ERRORS = {"WIDTH": 3584, "BLOCK": 1024, "HAS_TAKEN": True}
ERROR_POINTERS = {"TAKEN": "*u8", "ERROR": "*fp32", "SQUARES": "*fp32"}
PARTS = dict.fromkeys(("PRODUCT", "BIAS", "OUT"), "*fp32")
MIX_POINTERS = dict.fromkeys(("LOGIT", "LOGIT_GRAD"), "*fp32")
LOGIT = {"LOGIT": "*fp32"}
WIDE_DT = dict.fromkeys(("DT_BIAS", "RATE"), "*fp32")

# name -> module, kernel, constants, warps or tiles by dtype, stages, pointers of another type than elsewhere
KERNELS = {
    "scalars": ("scan.kernels.scalars", "scalars_kernel", SCAN | {"BLOCK": 16}, 4, 3, {}),
    "sweep": ("scan.kernels.states", "sweep_kernel", SCAN | SWEEP, None, 3, {"WEIGHT": "*fp32"}),
    "sweep_runs": (
        "scan.kernels.states",
        "sweep_kernel",
        SCAN | SWEEP | {"STARTS": False},
        None,
        3,
        {"WEIGHT": "*fp32"},
    ),
    "sweep_partner": (
        "scan.kernels.states",
        "sweep_kernel",
        SCAN | SWEEP | GRADIENT | {"HAS_PARTNER": True, "RATIO": 1},
        None,
        3,
        {"WEIGHT": "*fp32"},
    ),
    "link": (
        "scan.kernels.states",
        "link_kernel",
        {"HEADS": 28, "BLOCK": 512, "REVERSED": 1, "HAS_START": True},
        4,
        3,
        {},
    ),
    "rates": ("scan.kernels_backward.scalars", "rates_kernel", SCAN | GRADIENT | {"BLOCK": 16}, 8, 3, {}),
    "norm_gradient": ("scan.kernels_backward.norm", "norm_gradient_kernel", SCAN | {"ROWS": 32}, 4, 3, {}),
    "output": ("scan.kernels.output", "output_kernel", SCAN, None, 1, {}),
    "reader": ("scan.kernels_backward.readers", "reader_kernel", SCAN | GRADIENT, 8, 1, {}),
    "writer_x": (
        "scan.kernels_backward.writers",
        "writer_kernel",
        SCAN | GRADIENT | {"OF_X": True},
        8,
        1,
        {},
    ),
    "writer_b": (
        "scan.kernels_backward.writers",
        "writer_kernel",
        SCAN | GRADIENT | {"OF_X": False},
        8,
        1,
        {},
    ),
    "attend": ("window_attention.kernels", "attend_kernel", WINDOW, window_kernels.FORWARD, None, PLAN),
    "attend_held": (
        "window_attention.kernels",
        "attend_held_kernel",
        WINDOW,
        window_kernels.HELD,
        None,
        PLAN,
    ),
    "query_gradient": (
        "window_attention.kernels_backward",
        "query_gradient_kernel",
        WINDOW,
        window_gradients.QUERY_GRADIENT,
        None,
        PLAN,
    ),
    "key_gradient": (
        "window_attention.kernels_backward",
        "key_gradient_kernel",
        WINDOW | {"ONE_WINDOW": False},
        window_gradients.KEY_GRADIENT,
        None,
        PLAN,
    ),
    "query_gradient_held": (
        "window_attention.kernels_backward",
        "query_gradient_held_kernel",
        WINDOW,
        window_gradients.QUERY_HELD,
        None,
        PLAN,
    ),
    "key_gradient_held": (
        "window_attention.kernels_backward",
        "key_gradient_kernel",
        WINDOW | {"KEYS": window_gradients.ANY, "ONE_WINDOW": True},
        window_gradients.KEY_HELD,
        None,
        PLAN,
    ),
    "sliding": ("sliding_window_attention.kernels", "attend_kernel", SLIDING, sliding.FORWARD, None, SPANS),
    "sliding_query": (
        "sliding_window_attention.kernels_backward",
        "query_gradient_kernel",
        SLIDING,
        sliding_backward.QUERY_GRADIENT,
        None,
        SPANS,
    ),
    "sliding_key": (
        "sliding_window_attention.kernels_backward",
        "key_gradient_kernel",
        SLIDING,
        sliding_backward.KEY_GRADIENT,
        None,
        SPANS,
    ),
    "sliding_step": (
        "sliding_window_attention.kernels_step",
        "attention_kernel",
        SLIDING_STEP,
        "window",
        3,
        {"PRESENT": "*u8"},
    ),
    "sliding_ring": (
        "sliding_window_attention.kernels_ring",
        "ring_kernel",
        RING,
        "ring",
        None,
        LOGIT | dict.fromkeys(("PRESENT", "COS", "SIN"), "*fp32") | dict.fromkeys(("PLACE", "TURN"), "*i64"),
    ),
    "sliding_move": (
        "sliding_window_attention.kernels_step",
        "move_kernel",
        SLIDING_STEP,
        4,
        2,
        dict.fromkeys(("PRESENT", "NEXT"), "*u8"),
    ),
    "conv_forward": ("causal_conv.kernels", "forward_kernel", CONV, 4, 3, {}),
    "conv_backward": ("causal_conv.kernels_backward", "backward_kernel", CONV, 4, 3, {}),
    "divergence": ("losses.kernels", "divergence_kernel", LOSS, 8, 3, {"OUT": "*fp32"}),
    "divergence_gradient": ("losses.kernels", "gradient_kernel", LOSS, 8, 3, {}),
    "step": ("decoding.kernels.scan_step", "step_kernel", SCAN, 4, 3, {"STATE": "*fp32"}),
    "mix": ("elementwise.kernels", "mix_kernel", MIX, 4, 3, {"LOGIT": "*fp32"}),
    "mix_gradient": ("elementwise.kernels", "mix_gradient_kernel", MIX, 4, 3, MIX_POINTERS),
    "rope": (
        "elementwise.kernels",
        "rope_kernel",
        ROPE,
        4,
        3,
        {"COS": "*fp32", "SIN": "*fp32", "TOKEN": "*i64"},
    ),
    "parts": ("elementwise.kernels", "parts_kernel", {"COLUMNS": 29, "PARTS": 32, "BLOCK": 32}, 1, 3, PARTS),
    "add_norm": ("elementwise.kernels_layer", "add_norm_kernel", NORM, 8, 3, {}),
    "norm_backward": ("elementwise.kernels_layer", "norm_backward_kernel", NORM, 8, 3, {}),
    "gate": ("elementwise.kernels_layer", "gate_kernel", {"BLOCK": 1024}, 4, 3, {}),
    "gate_backward": ("elementwise.kernels_layer", "gate_backward_kernel", {"BLOCK": 1024}, 4, 3, {}),
    "errors": ("losses.kernels_hidden", "errors_kernel", ERRORS, 4, 3, ERROR_POINTERS),
    "errors_gradient": ("losses.kernels_hidden", "errors_gradient_kernel", ERRORS, 4, 3, ERROR_POINTERS),
    "text_step": ("decoding.kernels.text_step", "text_step_kernel", TOKEN, "step", 3, TOKEN_POINTERS),
    "text_step_pooled": (
        "decoding.kernels.text_step",
        "text_step_kernel",
        POOLED_TOKEN,
        "step",
        3,
        TOKEN_POINTERS | LOGIT | {"PLACE": "*i64", "TURN": "*i64"},
    ),
    "project_one": ("decoding.kernels.text_step", "project_kernel", PROJECT | {"rows": 1}, 4, 3, WIDE_DT),
    "output_one": ("decoding.kernels.text_step", "text_output_kernel", OUTPUT | {"rows": 1}, 4, 3, LOGIT),
    "output_four": ("decoding.kernels.text_step", "text_output_kernel", OUTPUT | {"rows": 4}, 4, 3, LOGIT),
    "heads": ("elementwise.kernels", "heads_kernel", MIX, 4, 3, LOGIT),
    "project_four": ("decoding.kernels.text_step", "project_kernel", PROJECT | {"rows": 4}, 4, 3, WIDE_DT),
}
KERNELS |= {
    f"{name}_packed": (module, kernel, chosen | {"HAS_SEQUENCE": True}, *rest)
    for name, (module, kernel, chosen, *rest) in KERNELS.items()
    if "HAS_SEQUENCE" in chosen and not name.startswith("sweep")
}


def constants(size: int, dtype: str, chosen: dict, names: list[str]) -> dict:
    """The compile-time constants of one kernel at N = P = `size`."""
    kind = DTYPES[dtype]
    scanned = scan_tiles.token_dtype(kind)
    axes = ("N", "P", "BLOCK_N", "BLOCK_P")
    step_size = scan_tiles.half_step if chosen["kernel"] == "writer_kernel" else scan_tiles.step_size
    steps = dict.fromkeys(("STEP", "STEP_N", "STEP_P"), step_size(size, scanned))
    known = {"SIZE": size * size, "HAS_PARTNER": False}
    sizes = scan_tiles.GRADIENT_CHUNKS if chosen.get("gradient") else scan_tiles.CHUNKS
    known |= {"CHUNK": sizes[scanned], "ROWS": scan_tiles.part_size(scanned, sizes[scanned])}
    known |= dict.fromkeys(axes, size) | steps | chosen
    known |= {"FINE": dtype != "fp32"}
    known |= {"HALF": size // 2, "BLOCK_HALF": size // 2}
    if "rows" in chosen:  # the sizes of a projection are its own
        rows = chosen["rows"]
        outputs = chosen.get("OUTPUTS", text_step_kernels.OUTPUTS[rows])
        step = text_step_kernels.ELEMENTS[rows] // (rows * outputs)
        known |= {"ROWS": rows, "OUTPUTS": outputs, "STEP": step}
    if "tiles" in chosen:
        known |= {"ROWS": chosen["tiles"].rows, "COLUMNS": chosen["tiles"].columns}
    if chosen["kernel"] == "sweep_kernel":
        blocks = scan_states.sweep_blocks(size, size, known["RATIO"], scanned, known["HAS_PARTNER"])
        known |= dict(zip(("BLOCK_N", "BLOCK_H", "BLOCK_P"), blocks, strict=True))
    elif chosen["kernel"] == "output_kernel":
        known |= scan_output.output_tiles(size, size, scanned, known["CHUNK"])[0]
    elif "PLACES" in chosen:
        moves = chosen["kernel"] == "move_kernel"
        known["COLUMNS"] = sliding_step.MOVED if moves else sliding_step.READ[size > 128]
        if chosen["kernel"] == "ring_kernel":
            known["COLUMNS"] = sliding_ring.tile_of_ring(size, 128)[0]
    elif chosen["kernel"] == "step_kernel":
        known["BLOCK_P"] = min(size, 32)
    elif chosen["kernel"] == "text_step_kernel":
        known["BLOCK_N"] = text_step_kernels.tile_of_step(chosen["programs"], size)[0]
    return {name: known[name] for name in names if name in known}


def signature(names: list[str], dtype: str, fixed: dict, special: dict[str, str]) -> dict[str, str]:
    """Types of all arguments: capitals are pointers, by default to `dtype`."""

    def kind(name: str) -> str:
        if name in fixed:
            return "constexpr"
        if name in FLOATS:
            return "fp32"
        if name.islower():
            return "i32"
        if name in special:
            return special[name]
        known = (("*fp32", FLOAT32), ("*i32", INT32), ("*i64", INT64), ("*u8", MASKS))
        return next((kind for kind, names in known if name in names), f"*{dtype}")

    return {name: kind(name) for name in names}


def assembler_report(ptx: str) -> str:
    """What ptxas says about registers; triton 3.9's code needs the newer of its two assemblers."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "kernel.ptx"
        source.write_text(ptx)
        for assembler in ("ptxas", "ptxas-blackwell"):
            command = [
                folder / assembler,
                "-v",
                "-arch=sm_90a",
                source,
                "-o",
                Path(temporary) / "kernel.cubin",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stderr
    raise RuntimeError(done.stderr)


def compile_kernel(name: str, dtype: str, size: int) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and instructions of one kernel."""
    module, function, chosen, warps, stages, special = KERNELS[name]
    kernel = getattr(importlib.import_module(f"linmu.optimized.{module}"), function)
    if isinstance(warps, dict):  # window attention's tiles, by dtype, or by dtype and head dim
        found = warps.get(DTYPES[dtype]) or warps[DTYPES[dtype], 128 if size <= 128 else 256]
        chosen = chosen | {"tiles": found}
        warps, stages = chosen["tiles"].warps, chosen["tiles"].stages
    fixed = constants(size, dtype, chosen | {"kernel": function}, kernel.arg_names)
    types = signature(kernel.arg_names, dtype, fixed, special)
    aligned = (n for n, kind in types.items() if kind[0] == "*" or (kind == "i32" and n.endswith(STRIDES)))
    places = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=places)
    if warps is None:
        warps = 8 if size > 64 else 4
    elif warps == "step":
        warps = text_step_kernels.tile_of_step(chosen["programs"], size)[1]
    elif warps == "window":
        warps = sliding_step.WARPS[DTYPES[dtype].itemsize == 2]
    elif warps == "ring":
        warps, stages = sliding_ring.tile_of_ring(size, 128)[1:]
    options = {"num_warps": warps, "num_stages": stages}
    if function == "output_kernel":
        options = scan_output.output_tiles(size, size, scan_tiles.token_dtype(DTYPES[dtype]), fixed["CHUNK"])[
            1
        ]
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx, report = built.asm["ptx"], assembler_report(built.asm["ptx"])
    registers, stores, loads = (
        int(re.search(pattern, report)[1])
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    return {
        "registers": registers,
        "spill_stores": stores,
        "spill_loads": loads,
        "shared": built.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma_sync": ptx.count("mma.sync"),
        "linear_layouts": sum(min(map(int, sides)) > 1 for sides in LINEAR.findall(built.asm["ttgir"])),
    }


if __name__ == "__main__":
    kernel, *asked = sys.argv[1:]
    by_dtype = (pair.split(":") for pair in asked)
    print(
        json.dumps(
            {
                dtype: {size: compile_kernel(kernel, dtype, int(size)) for size in sizes.split(",")}
                for dtype, sizes in by_dtype
            }
        )
    )
