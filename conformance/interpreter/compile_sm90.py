"""Compile one Triton kernel of linmu.optimized for sm_90 and print what it takes, as JSON. No GPU, no driver.

python compile_sm90.py KERNEL DTYPE SIZE...
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

from linmu.optimized import scan_states, scan_tiles, text_step_kernels, window_kernels

# fmt: off
FLOAT32 = {
    "A", "BACKWARD", "BACKWARD_GATE", "BACKWARD_PAIRS", "BACKWARD_PULLED", "BACKWARD_READ", "BACKWARD_STATE",
    "BACKWARD_WRITE", "ENTERING", "FORWARD_STATE", "PARTNER",
    "BIAS_GRAD", "D", "DELTA", "DT", "DT_GRAD", "FACTOR", "FINAL", "FINAL_GRAD", "FORWARD", "FORWARD_GATE",
    "FORWARD_PAIRS", "FORWARD_PULLED", "FORWARD_READ", "FORWARD_WRITE", "GATE_GRAD", "KEPT", "LEAVING", "LSE",
    "NEW_STATE", "PRODUCT", "SCALE", "START", "STATES", "WEIGHT_GRAD",
}
# fmt: on
INT64 = {"SEGMENT", "TOKEN", "WINDOW", "FIRST", "LAST", "RANK", "PLACE", "ORDER", "COUNT"}
MASKS = {"VALID", "MASK", "VISION"}
FLOATS = {"scale", "natural_scale", "inverse", "eps"}
STRIDES = ("batch", "token", "head")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCAN = {"HEADS": 28, "RATIO": 7, "HAS_VALID": True, "HAS_VISION": True, "HAS_SKIP": True}
SCAN |= {"HAS_ORDER": True, "HAS_NORM": True, "KEEPS": True}
SWEEP = {"LEFT_RATIO": 7, "RIGHT_RATIO": 7, "RUN": 16, "REVERSE": True, "HAS_START": True, "STORES": True}
SWEEP |= {"LEAVES": True, "HAS_PARTNER": True}
CONV = {
    "CHANNELS": 4608,
    "TAPS": 4,
    "BEFORE": 4,
    "ROWS": 32,
    "COLUMNS": 64,
    "HAS_MASK": True,
    "HAS_ORDER": True,
    "HAS_BIAS": True,
    "HAS_START": True,
    "SCALES": True,
}
TOKEN = {"HEADS": 28, "RATIO": 7, "TAPS": 4, "ROWS": 4, "HAS_BIAS": True, "HAS_NORM": True, "HAS_Z": True}
TOKEN |= {"HAS_VALID": True}
PROJECT = {"WIDTH": 3584, "HEADS": 28, "GROUPED": 512, "INNER": 3584, "HAS_BIAS": True, "HAS_Z": True}
MIX = {"WIDTH": 3584, "BLOCK": 1024}
ROPE = {"HEADS": 28, "BLOCK_HEADS": 32, "BACKWARD": True}
WINDOW = {"HEADS": 28, "RATIO": 7, "window": True}
LOSS = {"SIZE": 151_936, "BLOCK": 2048, "HAS_MASK": True}

TOKEN_POINTERS = dict.fromkeys(("STATE", "NEXT", "RATE", "A_LOG", "WEIGHT", "BIAS", "NORM"), "*fp32")
MIX_POINTERS = dict.fromkeys(("LOGIT", "LOGIT_GRAD"), "*fp32")
WIDE_DT = dict.fromkeys(("DT_BIAS", "RATE"), "*fp32")

# name -> module, kernel, constants, warps, stages, pointers of another type than their name has elsewhere
KERNELS = {
    "sweep": (
        "scan_states",
        "sweep_kernel",
        SCAN | SWEEP,
        None,
        2,
        {"WEIGHT": "*fp32"},
    ),
    "link": (
        "scan_states",
        "link_kernel",
        {"HEADS": 28, "BLOCK": 1024, "REVERSE": True, "HAS_START": True},
        4,
        3,
        {},
    ),
    "norm_gradient": ("norm_kernels", "norm_gradient_kernel", SCAN | {"ROWS": 32}, 4, 3, {}),
    "output": ("scan_output", "output_kernel", SCAN, None, 1, {}),
    "reader": ("scan_readers", "reader_kernel", SCAN, 8, 1, {}),
    "writer_x": ("scan_writers", "writer_kernel", SCAN | {"transposed": False}, 8, 1, {}),
    "writer_b": ("scan_writers", "writer_kernel", SCAN | {"transposed": True}, 8, 1, {}),
    "attend": ("window_kernels", "attend_kernel", WINDOW, "rows", 1, {}),
    "query_gradient": ("window_kernels", "query_gradient_kernel", WINDOW | {"narrow": True}, "rows", 1, {}),
    "key_gradient": ("window_kernels", "key_gradient_kernel", WINDOW | {"narrow": True}, "rows", 1, {}),
    "conv_forward": ("conv_kernels", "forward_kernel", CONV, 4, 3, {}),
    "conv_backward": ("conv_kernels", "backward_kernel", CONV, 4, 3, {}),
    "divergence": ("loss_kernels", "divergence_kernel", LOSS, 8, 3, {"OUT": "*fp32"}),
    "divergence_gradient": ("loss_kernels", "gradient_kernel", LOSS, 8, 3, {}),
    "step": ("step_kernels", "step_kernel", SCAN, 4, 3, {"STATE": "*fp32"}),
    "mix": ("mixing_kernels", "mix_kernel", MIX, 4, 3, {"LOGIT": "*fp32"}),
    "mix_gradient": ("mixing_kernels", "mix_gradient_kernel", MIX, 4, 3, MIX_POINTERS),
    "rope": ("rope_kernels", "rope_kernel", ROPE, 4, 3, dict.fromkeys(("COS", "SIN"), "*fp32")),
    "text_step": ("text_step_kernels", "text_step_kernel", TOKEN, "step", 3, TOKEN_POINTERS),
    "project_one": ("text_step_kernels", "project_kernel", PROJECT | {"rows": 1}, 4, 3, WIDE_DT),
    "project_four": ("text_step_kernels", "project_kernel", PROJECT | {"rows": 4}, 4, 3, WIDE_DT),
}


def constants(size: int, dtype: str, chosen: dict, names: list[str]) -> dict:
    """The compile-time constants of one kernel at N = P = `size`."""
    transposed, kind = chosen.get("transposed", False), DTYPES[dtype]
    scanned = scan_tiles.token_dtype(kind)
    axes = ("N", "P", "BLOCK_N", "BLOCK_P", "INNER", "OUTER", "BLOCK_OUTER")
    steps = dict.fromkeys(("STEP", "STEP_N", "STEP_P"), scan_tiles.step_size(size, scanned))
    strides = {"INNER_STRIDE": 1 if transposed else size, "OUTER_STRIDE": size if transposed else 1}
    known = {"PRECISION": scan_tiles.precision(kind), "SIZE": size * size, "PULLS": transposed}
    known |= {"CHUNK": scan_tiles.chunk_size(scanned)} | dict.fromkeys(axes, size) | steps | strides | chosen
    known |= {"HALF": size // 2, "BLOCK_HALF": size // 2}
    if "rows" in chosen:  # the sizes of a projection are its own
        rows, outputs = chosen["rows"], text_step_kernels.OUTPUTS[chosen["rows"]]
        step = text_step_kernels.ELEMENTS[rows] // (rows * outputs)
        known |= {"ROWS": rows, "OUTPUTS": outputs, "STEP": step}
    if "window" in chosen:
        rows, step = window_kernels.ROWS[kind], window_kernels.attention_step(size, kind)
        known |= {"ROWS": rows, "COLUMNS": min(rows, 32) if "narrow" in chosen else rows}
        known |= {"STEP_N": step, "STEP_P": step}
    blocks = {"sweep_kernel": scan_states.BLOCKS[scanned], "step_kernel": 32}
    known["BLOCK_P"] = min(size, blocks.get(chosen.get("kernel"), size))
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
        known = (("*fp32", FLOAT32), ("*i64", INT64), ("*u8", MASKS))
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
    fixed = constants(size, dtype, chosen | {"kernel": function}, kernel.arg_names)
    types = signature(kernel.arg_names, dtype, fixed, special)
    aligned = (n for n, kind in types.items() if kind[0] == "*" or (kind == "i32" and n.endswith(STRIDES)))
    places = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=places)
    if warps is None:
        warps = 8 if size > 64 else 4
    elif warps == "step":
        warps = text_step_kernels.WARPS[size > 64]
    elif warps == "rows":
        warps = 8 if fixed["ROWS"] > 16 else 4
    options = {"num_warps": warps, "num_stages": stages}
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
        "linear_layouts": built.asm["ttgir"].count("ttg.linear"),
    }


if __name__ == "__main__":
    sizes = map(int, sys.argv[3:])
    print(json.dumps({size: compile_kernel(sys.argv[1], sys.argv[2], size) for size in sizes}))
