"""`python -m linmu.optimized.serving.benchmark student|teacher`: vLLM's speed and room for one of the two.

Both are a Qwen2 decoder of the sizes of Qwen2.5-VL-7B with random weights, in one process each, under vLLM's
own settings but for these: a student's decoding steps run from CUDA graphs, and there is no prefix caching.

- *decoding*: milliseconds a step while so many requests decode, from two runs of different numbers of tokens,
  whose difference leaves admission out. A student's step does not depend on what was read, so its prompts are
  short. The teacher's keys and values are constants that vLLM's DecodeBenchConnector writes; computing them
  for a full pool would take minutes and change no shape.
- *prompt*: time to first token and time between tokens of requests whose prompts are computed.
- *pool*: how many tokens (teacher) or requests (student) fit in the memory that vLLM has left for them.

It appends a JSON line for each to `--out` as soon as it is measured, and ends within `--budget`; `report`
makes tables and a plot of such files.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from .report import COMMAND, SHORT, report

SIZES = {
    "7b": {  # the decoder of Qwen/Qwen2.5-VL-7B-Instruct
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "tiny": {  # to try the command on a CPU
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
    },
}
LENGTHS = (32768, 2048, 131072, 8192)  # the most telling first
COUNTS = (256, 1, 16, 64)
STEPS = (4, 68)  # tokens that two runs generate; the difference is timed
ANSWER = 17  # tokens after a prompt
HELD = 64  # tokens that a request may add


def main() -> None:
    """Measure, or report."""
    arguments = parse()
    if arguments.who == "report":
        report(arguments.out, Path(arguments.folder))
        return
    begun, out = time.perf_counter(), Path(arguments.out[0])
    common = {"who": arguments.who, "quantization": arguments.quantization, "size": arguments.size}
    common |= {"sync": arguments.sync or None}
    signal.signal(signal.SIGALRM, out_of_time)
    signal.signal(signal.SIGTERM, out_of_time)
    signal.alarm(arguments.budget)
    llm = None
    try:
        llm = engine(arguments)
        write(out, common | {"cell": "start", "seconds": round(time.perf_counter() - begun, 1)} | versions())
        room = pool(llm, arguments)
        write(out, common | {"cell": "pool"} | room)
        for cell in cells(arguments, room):
            measure = decoding if cell["cell"] == "decoding" else prompt
            left = arguments.budget - (time.perf_counter() - begun)
            write(out, common | cell | measure(llm, arguments, cell["length"], cell["requests"], left))
    except TimeoutError as error:
        write(out, common | {"cell": "end", "skipped": str(error)})
    finally:
        signal.alarm(0)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()  # it holds the GPU in a process of its own


def out_of_time(number: int, frame) -> None:
    """End what runs: a signal's handler."""
    raise TimeoutError("the budget was spent" if number == signal.SIGALRM else "ended from outside")


def parse() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n\n")[0])
    parser.add_argument("who", choices=("student", "teacher", "report"))
    parser.add_argument("--out", nargs="+", default=["serving.jsonl"], help="files of JSON lines")
    parser.add_argument("--folder", default="optimized/results/serving", help="where `report` writes")
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="requests at once")
    parser.add_argument("--most", type=int, default=1024, help="requests in a step; vLLM's max_num_seqs")
    parser.add_argument("--quantization", choices=("fp8",), help="of the weights, by vLLM")
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU that vLLM may use")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs; a CPU has none")
    parser.add_argument("--sync", action="store_true", help="a student's steps planned one after another")
    parser.add_argument("--budget", type=int, default=600, help="seconds after which it ends, start included")
    return parser.parse_args()


def folder_of(who: str, size: str, longest: int) -> str:
    """Write a model's config.json and return its folder; the weights are vLLM's dummies."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from .. import convert

    rope = {"rope_type": "default", "rope_theta": 1e6}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = SIZES[size] | {"max_position_embeddings": 2 * longest, "rope_parameters": rope}
    config = Qwen2Config(**sizes, **special, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["Qwen2ForCausalLM"]
    if who == "student":
        with torch.device("meta"):
            student = convert(Qwen2ForCausalLM(config))
        config = student.config
        config.architectures = [type(student).__name__]
    folder = tempfile.mkdtemp()
    config.save_pretrained(folder)
    return folder


def engine(arguments: argparse.Namespace):
    """Start vLLM."""
    import vllm

    is_student, longest = arguments.who == "student", max(arguments.lengths) + HELD
    options: dict[str, Any] = {"enforce_eager": True} if arguments.eager else {}
    if is_student and not arguments.eager:
        sizes = sorted({n for n in (1, 2, 4, 8, *arguments.counts, arguments.most) if n <= arguments.most})
        graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        options["compilation_config"] = graphs
    if is_student:
        options["async_scheduling"] = not arguments.sync
    else:
        options |= {"enable_prefix_caching": False, "kv_transfer_config": connector()}
    return vllm.LLM(
        model=folder_of(arguments.who, arguments.size, longest),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        quantization=arguments.quantization,
        max_model_len=longest,
        max_num_seqs=arguments.most if is_student else min(arguments.most, 256),
        gpu_memory_utilization=arguments.memory,
        disable_log_stats=False,  # its times of first tokens
        **options,
    )


def connector():
    """Return vLLM's connector that fills keys and values, for the requests that ask for it."""
    from vllm.config import KVTransferConfig

    module = f"{__package__}.filled_keys_and_values"
    name = "FilledKeysAndValues"
    return KVTransferConfig(kv_connector=name, kv_connector_module_path=module, kv_role="kv_both")


def versions() -> dict[str, Any]:
    """Say what ran, and on what."""
    import torch
    import transformers
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {"device": device, "torch": torch.__version__, "vllm": vllm.__version__}
    return found | {"transformers": transformers.__version__}


def pool(llm, arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what the memory holds: requests of a student, tokens of the teacher."""
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = cache.num_gpu_blocks - 1  # one is vLLM's own, for nobody
    if arguments.who == "student":
        return {"blocks": blocks, "held": {str(length): blocks for length in arguments.lengths}}
    tokens = blocks * cache.block_size
    held = {str(length): tokens // (length + HELD) for length in arguments.lengths}
    return {"blocks": blocks, "tokens": tokens, "held": held}


def cells(arguments: argparse.Namespace, room: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what to measure, the most telling first."""

    def cell(kind: str, length: int | None, requests: int) -> dict[str, Any]:
        return {"cell": kind, "length": length, "requests": requests}

    if arguments.who == "student":
        for count in sorted({*arguments.counts, arguments.most}):
            yield cell("decoding", None, min(count, room["blocks"]))
    else:
        for length in arguments.lengths:
            most = room["held"][str(length)]
            full = [most] if most < max(arguments.counts) else []
            fit = [count for count in arguments.counts if count <= most]
            yield from (cell("decoding", length, count) for count in (*full, *fit) if count)
    few = sorted(arguments.lengths)
    yield from (cell("prompt", length, 1) for length in few)
    yield from (cell("prompt", length, 16) for length in few[:2])
    if arguments.who == "student":
        yield cell("prompt", few[min(2, len(few) - 1)], 4)


def run(llm, size: str, length: int, requests: int, tokens: int, filled: bool) -> tuple[float, list]:
    """Answer so many prompts of random tokens; return the seconds, and vLLM's outputs."""
    import numpy as np
    import vllm

    draw = np.random.default_rng(length + requests)
    drawn = draw.integers(0, SIZES[size]["vocab_size"], (requests, length))
    prompts = [{"prompt_token_ids": ids.tolist()} for ids in drawn]
    extra = {"kv_transfer_params": {"filled": True}} if filled else None
    options = vllm.SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )
    begun = time.perf_counter()
    outputs = llm.generate(prompts, options, use_tqdm=False)
    return time.perf_counter() - begun, outputs


def decoding(
    llm, arguments: argparse.Namespace, length: int | None, requests: int, left: float
) -> dict[str, Any]:
    """Time a step in which all requests decode, after prompts of `length` tokens; None = a few.

    Nothing is timed if, by the first run, it would not end in the seconds that are left.
    """
    asked = (arguments.size, length or SHORT, requests)
    filled = arguments.who == "teacher"
    first, _ = run(llm, *asked, STEPS[0], filled)
    admission, _ = run(llm, *asked, STEPS[0], filled)
    if first + 4 * admission > left:
        return {"skipped": f"{admission:.1f} s a run, {left - first - admission:.0f} s were left"}
    short = min(admission, run(llm, *asked, STEPS[0], filled)[0])
    long, _ = run(llm, *asked, STEPS[1], filled)
    step = (long - short) / (STEPS[1] - STEPS[0])
    found = {"ms_a_step": round(1e3 * step, 3), "tokens_per_second": round(requests / step, 1)}
    return found | {"seconds_of_short_run": round(short, 3)}


def prompt(llm, arguments: argparse.Namespace, length: int, requests: int, left: float) -> dict[str, Any]:
    """Time prompts that are computed, and the tokens after them; the second of two runs."""
    if left <= 0:
        return {"skipped": "no time was left"}
    asked = (arguments.size, length, requests)
    if length * requests <= 2**15:
        run(llm, *asked, 2, False)
    seconds, outputs = run(llm, *asked, ANSWER, False)
    found = [output.metrics for output in outputs]
    firsts = [each.first_token_latency for each in found]
    between = [(each.last_token_ts - each.first_token_ts) / (ANSWER - 1) for each in found]
    return {
        "seconds": round(seconds, 3),
        "ms_to_first_token": round(1e3 * mean(firsts), 1),
        "ms_to_last_first_token": round(1e3 * max(firsts), 1),
        "ms_between_tokens": round(1e3 * median(between), 3),
    }


def write(path: Path, line: dict[str, Any]) -> None:
    """Append a line, and print it."""
    line = {name: value for name, value in line.items() if value is not None}
    print(json.dumps(line), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
