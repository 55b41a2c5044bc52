"""Students in vLLM give what generate() gives: skipped where vLLM is not installed.

optimized/serving/README.md says how to install it on a CPU. The model is tiny and untrained, and runs in
float32: there is no margin behind which a wrong state could hide.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from linmu.optimized import MMATE, convert, load
from linmu.optimized.serving.vllm_plugin import TESTED
from linmu.reference.config import LinMUConfig
from linmu.reference.prompts.qwen_processing import FrameProcessor
from linmu.reference.student.model import LinMUModel

from ..student.tiny_checkpoint import shake_mixers
from ..student.tiny_families import BUILDERS, finished
from .requests_at_random import IMAGE, KINDS, Request, request_at_random

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
vllm = pytest.importorskip(
    "vllm", reason="pip install 'linmu[vllm]' brings vLLM, see optimized/serving/README.md"
)
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.forward_context import get_forward_context  # noqa: E402

AT_ONCE = 32
LETTERS = list(range(256))  # no placeholder is ever drawn
LONGEST = 448  # tokens of a prompt and its answer; a step has room for as many
GRAPHS = os.environ.get("LINMU_VLLM_GRAPHS") == "1"  # on a GPU: decoding steps replayed
ASYNC = os.environ.get("LINMU_VLLM_ASYNC") == "1"  # a step planned while the one before runs
REQUESTS = int(os.environ.get("LINMU_VLLM_REQUESTS", "100"))
STUDENTS: dict[str, tuple[str, list[int] | None, int]] = {  # family, converted layers, ranks
    "qwen2_5_vl": ("qwen2_5_vl", None, 1),
    "qwen3_vl": ("qwen3_vl", None, 1),
    "qwen2_5_vl, middle layer attends": ("qwen2_5_vl", [0, 2], 1),
    "qwen3_vl, two layers attend": ("qwen3_vl", [1], 1),
    "qwen2_vl": ("qwen2_vl", None, 1),
    "qwen2": ("qwen2", None, 1),
    "llama, two layers attend": ("llama", [1], 1),
    "qwen3_vl, ten blocks": ("qwen3_vl", [1], 1),
    "two ranks": ("qwen2_5_vl", [0, 2], 2),
}


def tiny_student(family: str, layers: list[int] | None) -> tuple[LinMUModel, object]:
    """Return a student with a text window and picture windows shorter than its prompts, and its processor.

    vLLM's attention on a CPU wants heads of 32 or more, so a hybrid's are wider than those of `BUILDERS`.
    """
    tiny = BUILDERS[family]()
    teacher, config = tiny.teacher, tiny.teacher.config
    frames = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen3_vl":
        size = {"shortest_edge": 64, "longest_edge": 16384}
        tiny.processor.video_processor = transformers.Qwen3VLVideoProcessor(**frames, size=size)
    elif tiny.image:
        tiny.processor.video_processor = FrameProcessor(**frames, min_pixels=64, max_pixels=4096)
    if layers is not None:
        text = config.get_text_config()
        if family == "qwen3_vl":
            text.head_dim = 32
        else:
            text.hidden_size, text.initializer_range = 128, 0.15
            text.head_dim = 32
        if tiny.image:
            text.rope_parameters["mrope_section"] = [6, 5, 5]
            if family != "qwen3_vl":
                config.vision_config.out_hidden_size = 128
        torch.manual_seed(0)
        teacher = finished(type(teacher)(config), getattr(tiny.processor, "tokenizer", tiny.processor))
    options = {"text_window": 6, "window_thw": (2, 2, 2)}
    return shake_mixers(convert(teacher, options, layers=layers)), tiny.processor


class Served:
    """A student's folder, vLLM's engine on it, and what generate() answers."""

    def __init__(self, folder: str, name: str) -> None:
        family, layers, ranks = STUDENTS[name]
        student, processor = tiny_student(family, layers)
        student.save_pretrained(folder)
        processor.save_pretrained(folder)
        self.folder, self.ranks = folder, ranks
        self.student = load(folder).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.kinds = KINDS if student.prompt_layout is not None else KINDS[:1]
        if family == "qwen2_5_vl" and not vllm.__version__.startswith(TESTED):
            self.kinds = [kind for kind in KINDS if "video" not in kind]  # older ones lose the frame rate
        few = {"num_gpu_blocks_override": 11} if "ten blocks" in name else {}
        graphs = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}} if GRAPHS else {}
        pictures = {"limit_mm_per_prompt": {"image": 2, "video": 1}, "mm_processor_cache_gb": 0}
        self.engine = vllm.LLM(  # in this process, without changes but for its sizes
            model=folder,
            dtype="float32",
            max_model_len=LONGEST,
            max_num_batched_tokens=LONGEST,
            max_num_seqs=AT_ONCE,
            tensor_parallel_size=ranks,
            disable_log_stats=True,
            gpu_memory_utilization=0.3,
            async_scheduling=ASYNC,
            **few,
            **graphs,
            **(pictures if len(self.kinds) > 1 else {}),
        )

    def request(self, seed: int) -> Request:
        return request_at_random(seed, self.kinds)

    @torch.no_grad()
    def expected(self, request: Request) -> tuple[list[int], list[int], list[float]]:
        """Return a prompt's tokens, its answer's, and their log-probabilities."""
        others = list(range(len(LETTERS), self.student.config.get_text_config().vocab_size))
        inputs = request.for_generate(self.processor)
        options = {"max_new_tokens": request.tokens, "do_sample": False, "suppress_tokens": others}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        output = self.student.generate(**inputs, **options)
        prompt = inputs["input_ids"][0].tolist()
        tokens = output.sequences[0, len(prompt) :].tolist()
        pairs = zip(output.logits, tokens, strict=True)
        return prompt, tokens, [logits[0].log_softmax(-1)[token].item() for logits, token in pairs]

    def check(self, output, request: Request) -> None:
        prompt, tokens, logarithms = self.expected(request)
        (answer,) = output.outputs
        assert list(output.prompt_token_ids) == prompt, request
        assert list(answer.token_ids) == tokens, request
        found = [by_token[token].logprob for by_token, token in zip(answer.logprobs, tokens, strict=True)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(logarithms), rtol=0, atol=1e-4)

    def check_all(self, requests: list[Request]) -> None:
        given = [request.for_vllm() for request in requests]
        outputs = self.engine.generate(given, [sampling(request) for request in requests], use_tqdm=False)
        for request, output in zip(requests, outputs, strict=True):
            self.check(output, request)
        assert self.blocks_in_use() == 0

    def blocks_in_use(self) -> int:
        """Say how many rows of states, and blocks of keys and values, belong to a request."""
        pool = self.engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is vLLM's own, for nobody

    def model(self):
        return self.engine.llm_engine.model_executor.driver_worker.worker.model_runner.model


@pytest.fixture(scope="module", params=STUDENTS)
def served(request, tmp_path_factory):
    found = Served(str(tmp_path_factory.mktemp("student")), request.param)
    yield found
    found.engine.llm_engine.engine_core.shutdown()
    del found
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    student, processor = tiny_student("qwen2_5_vl", None)
    student.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def sampling(request: Request) -> vllm.SamplingParams:
    options = {"temperature": 0, "logprobs": 0, "ignore_eos": True, "allowed_token_ids": LETTERS}
    return vllm.SamplingParams(max_tokens=request.tokens, **options)


def test_all_requests_get_the_tokens_and_log_probabilities_of_generate(served):
    served.check_all([served.request(seed) for seed in range(REQUESTS)])


def test_a_request_alone_gets_the_same(served):
    for seed in range(5):
        served.check_all([served.request(seed + 1000)])


def test_prompts_of_one_token_take_no_state_from_those_before(served):
    served.check_all([served.request(seed) for seed in range(10)])  # leave states in the rows
    for count in (1, 3):
        served.check_all([Request("text", letter, [], [], 4) for letter in "abc"[:count]])


def test_an_aborted_request_leaves_no_state_and_its_neighbours_as_they_are(served):
    core = served.engine.llm_engine
    requests = {f"{seed}": served.request(seed) for seed in range(2000, 2010)}
    for name, request in requests.items():
        core.add_request(name, request.for_vllm(), sampling(request))
    aborted, outputs = {"2003", "2004", "2007"}, {}
    for step in range(500):
        outputs |= {output.request_id: output for output in core.step() if output.finished}
        if step == 1:
            core.abort_request(list(aborted))
        if not core.has_unfinished_requests():
            break
    for name, request in requests.items():
        if name not in aborted:
            served.check(outputs[name], request)
    assert served.blocks_in_use() == 0


def run_again(function) -> tuple:
    """In the place of a CUDA graph: the function itself, its result in fixed memory."""
    found = function()
    return lambda: found.copy_(function()), found


@pytest.mark.parametrize("served", ["qwen2_5_vl", "qwen2"], indirect=True)
def test_a_lone_prompt_of_text_from_a_graph_gives_what_generate_gives(served, monkeypatch):
    """Padded in front; requests beside others, with pictures, or longer than all graphs take none."""
    from vllm.forward_context import set_forward_context

    from linmu.optimized.serving.vllm_plugin.prompt_graphs import LonePrompt, PromptGraphs

    model, used, call = served.model(), [], LonePrompt.__call__
    given, captures = (model.angles, model.decode, model.step_of), []

    def new_capture():
        captures.append(run_again)
        return run_again

    graphs = PromptGraphs(new_capture, list(model.states.values()), *given)
    positions = torch.zeros(*[3] * (model.student.prompt_layout is not None), 0, dtype=torch.int64)
    config = served.engine.llm_engine.vllm_config
    with torch.inference_mode(), set_forward_context(None, config):
        graphs.capture(model.embeddings(), positions, (8, 32))
        graphs.capture(model.embeddings(), positions, (8, 32))
    assert len(captures) == 1
    monkeypatch.setattr(model, "prompt_graphs", graphs)
    monkeypatch.setattr(LonePrompt, "__call__", lambda *args: used.append(len(args[1])) or call(*args))
    lengths = [5, 8, 9, 31, 32, 33]
    for length in lengths:
        served.check_all([Request("text", ("abcdefg" * 5)[:length], [], [], 9)])
    assert used == lengths[:-1]
    served.check_all([served.request(seed) for seed in range(6)])
    assert used == lengths[:-1]
    pool = model.states[0].kv_cache[0]
    monkeypatch.setattr(model.states[0], "kv_cache", (pool.clone(), *model.states[0].kv_cache[1:]))
    assert graphs.find(5) is None, "its pools have moved"
    with torch.inference_mode(), set_forward_context(None, config):
        graphs.capture(model.embeddings(), positions, (8,))
    assert len(captures) == 2, "a pool of graphs that are gone is gone"
    assert graphs.find(5) is not None and graphs.find(9) is None


@pytest.mark.parametrize("served", ["qwen3_vl, ten blocks"], indirect=True)
def test_a_request_that_gave_its_blocks_away_starts_anew(served, monkeypatch):
    scheduler, preempted = served.engine.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def seen(request, *args, **kwargs):
        preempted.append(request)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", seen)
    requests = [served.request(seed) for seed in range(20)]
    for request in requests:
        request.tokens *= 9  # beyond a block of 128
    served.check_all(requests)
    assert preempted


def test_a_prompt_too_long_is_refused_and_the_engine_goes_on(served):
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="maximum context length"):
        served.engine.generate([{"prompt": "a" * (LONGEST + 1)}], use_tqdm=False)
    assert served.blocks_in_use() == 0
    served.check_all([served.request(3000)])


def test_the_state_of_a_layer_holds_the_text_window(served):
    if served.ranks > 1:
        return  # its layers are in other processes
    states, converted = served.model().states, served.student.config.linmu["layers"]
    assert list(states) == converted
    for layer in states.values():
        shapes = dict(zip(layer.names, layer.get_state_shape(), strict=True))
        groups, dim = layer.config.groups, layer.config.head_dim
        assert shapes["keys"] == shapes["values"] == (6, groups, dim) and shapes["present"] == (16,)
        assert [tensor.shape[1:] for tensor in layer.kv_cache] == list(shapes.values())


def test_new_weights_reach_what_was_prepared_of_the_old_ones():
    """In its place, where a captured step reads it."""
    from linmu.optimized.serving.vllm_plugin.layer import Step, prepare_again

    config = LinMUConfig(width=8, heads=4, groups=2, head_dim=4, text_window=3)
    blocks, prepared, zeros = [MMATE(config, index) for index in range(2)], {}, torch.zeros(1, 4, 4)
    with torch.inference_mode():
        found = Step((zeros, zeros), None, None, blocks, prepared).prepare(None)
    assert prepared == {True: found} and len(found) == 2 * 3  # A, and what a token is multiplied with
    flex_ma = blocks[1].flex_ma
    linears, narrow = blocks[1].joined_linears()
    rate, joined = found["A", id(flex_ma)], found["joined", *map(id, linears)]
    outputs = blocks[1].output_linears()
    beside = found["side by side", *map(id, outputs)]
    for parameter in blocks[1].parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    prepare_again(blocks, prepared)
    assert torch.equal(rate, -flex_ma.A_log.exp()) and rate is found["A", id(flex_ma)]
    assert torch.equal(joined.weight, torch.cat([linear.weight for linear in linears]))
    assert torch.equal(beside, torch.cat([linear.weight for linear in outputs], dim=1))
    assert torch.equal(joined.narrow_bias, torch.cat([linear.bias for linear in narrow]))


def test_a_cut_picture_is_refused_by_the_layer():
    from linmu.optimized.serving.vllm_plugin.layer import Step

    coords = torch.tensor([[-1] * 4, [0, 0, 0, 0], [0, 0, 0, 1], [-1] * 4])
    sizes = torch.tensor([0, 2, 2, 0])

    def layouts(*starts: int) -> list:
        step = Step((torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)), coords, sizes)
        prompts = step.batches(SimpleNamespace(starts=list(starts), past=[0] * (len(starts) - 1)))
        return [batch.layout for batch in prompts]

    assert layouts(0, 4)[0] is not None and layouts(3, 4) == [None]
    (both,) = layouts(0, 3, 4)
    assert both.coords[1].tolist() == [[-1] * 4] * 3 and torch.equal(both.coords[0], coords[:3])
    for start, end in ((0, 2), (2, 4)):
        with pytest.raises(ValueError, match="no image or video may be cut"):
            layouts(start, end)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_prefix_caching": True}, "prefix caching must be off"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculation must be off"),
        ({"tensor_parallel_size": 4}, "must divide the 2 groups"),
        ({"pipeline_parallel_size": 2}, "pipeline parallel size must be 1"),
        ({"enable_lora": True}, "LoRA must be off"),
        ({"mamba_cache_dtype": "bfloat16"}, "mamba_cache_dtype must be auto"),
        ({"additional_config": {"linmu": ["graphs"]}}, "must be a list of prompt_graphs"),
        ({"max_num_batched_tokens": 64}, "Please increase max_num_batched_tokens"),
    ],
)
def test_settings_that_no_student_can_have_are_refused(folder, options, reason):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal.encoder_budget import MultiModalBudget

    arguments = {"model": folder, "dtype": "float32", "max_model_len": LONGEST, "max_num_seqs": 4}
    with pytest.raises(ValueError, match=reason):
        config = EngineArgs(**arguments | options).create_engine_config()
        MultiModalBudget(config, vllm.multimodal.MULTIMODAL_REGISTRY)


def test_prompts_of_a_step_are_computed_together_as_far_as_padding_is_cheap():
    from linmu.optimized.serving.vllm_plugin.layer import PADDING, batches_of

    assert batches_of([1] * 256, [False] * 256) == [list(range(256))]
    assert batches_of([5, 9, 7], [False, True, False]) == [[2, 0], [1]]  # one pass has states, one has none
    assert batches_of([1, PADDING + 1, 1], [False] * 3) == [[1, 0], [2]]
    for lengths in ([2**14, 100, 90, 50], [4000, 3000, 2000, 1000, 1], list(range(1, 300))):
        found = batches_of(lengths, [False] * len(lengths))
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        for batch in found:
            assert sum(lengths[batch[0]] - lengths[i] for i in batch) <= PADDING


@pytest.mark.parametrize(
    ("starts", "runs"),
    [([1, 4, 7], [(1, 7)]), ([0, 7], [(0, 7)]), ([1, 3, 6, 7], [None]), ([0, 2, 5, 7], [None])],
)
def test_prompts_are_taken_from_a_step_and_put_back(starts, runs):
    """Side by side and as long they are a view; others are gathered, padded in front."""
    from linmu.optimized.serving.vllm_plugin.layer import Step

    tokens, rows = torch.arange(7.0)[:, None] + torch.zeros(7, 2), len(starts) - 1
    step = Step((tokens[None], -tokens[None]), None, None)
    output = torch.full_like(tokens, -1)
    batches = step.batches(SimpleNamespace(starts=starts, past=[0] * rows))
    assert [batch.run and (batch.run.start, batch.run.stop) for batch in batches] == runs
    for batch in batches:
        taken = batch.taken(tokens)
        assert torch.equal(batch.angles[0], taken) and torch.equal(batch.angles[1], -taken)
        if batch.run:
            assert taken.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
        batch.put(output, taken)
    assert torch.equal(output[starts[0] :], tokens[starts[0] :]) and (output[: starts[0]] == -1).all()


def test_a_step_computes_prompts_of_text_and_pictures_in_one_pass(served):
    """Ten at once, of other lengths: as many passes of a block as the step has kinds, not ten."""
    if served.ranks > 1:
        return  # its layers are in other processes
    passes, block = [], next(iter(served.model().states.values())).block
    handle = block.register_forward_pre_hook(lambda block, args: passes.append(args[0].shape))
    try:
        served.check_all([served.request(seed) for seed in range(6000, 6010)])
    finally:
        handle.remove()
    assert max(shape[0] for shape in passes if shape[1] > 1) > 2


def test_positions_carry_coordinates_and_come_back():
    from linmu.optimized.serving.vllm_plugin.positions import pack, unpack

    positions = torch.arange(15).view(3, 5)
    coords = torch.tensor([[-1] * 4, [1, 5, 0, 4095], [1, 0, 3, 0], [0, 0, 0, 0], [-1] * 4])
    found = unpack(pack(positions, coords))
    assert torch.equal(found[0], positions) and torch.equal(found[1], coords)
    assert found[2].tolist() == [0, 2, 2, 1, 0]


def test_text_after_a_long_video_goes_on_where_transformers_does(served):
    """Two frames high and wide, six long: vLLM's own positions go on from the sixth frame."""
    if "video" in served.kinds:
        served.check_all([next(r for r in map(request_at_random, range(4000, 5000)) if is_long(r))])


def is_long(request: Request) -> bool:
    """Whether it is one video of more moments than rows and columns of tokens, no image before."""
    if request.images or not request.videos or IMAGE in request.prompt:
        return False
    frames, height, width, _ = request.videos[0].shape
    return frames // 2 > max(height, width) // 8 + 1


def test_chunks_end_neither_in_a_picture_nor_before_one_of_one_token():
    from linmu.optimized.serving.vllm_plugin.scheduler import whole_tokens

    pictures = [(3, 4), (9, 1), (11, 1)]
    ends = [past + whole_tokens(pictures, past, tokens) for past, tokens in [(0, n) for n in range(1, 14)]]
    #        text 0-2, picture 3-6, text 7, 8, picture 9, text 10, picture 11, text
    assert ends == [1, 2, 3, 3, 3, 3, 7, 8, 8, 10, 10, 12, 13]
    assert whole_tokens(pictures, 8, 1) == 0 and whole_tokens(pictures, 8, 2) == 2
    assert whole_tokens([(0, 1)], 0, 1) == 1  # a prompt's first token has no state before: a prefill


class AsksTheHost(TorchDispatchMode):
    """Counts what a CUDA graph cannot hold: values and shapes that depend on a tensor's content."""

    KINDS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        indices = args[1] if operator.overloadpacket is torch.ops.aten.index and len(args) > 1 else ()
        by_mask = any(torch.is_tensor(index) and index.dtype == torch.bool for index in indices)
        if by_mask or any(kind in str(operator) for kind in self.KINDS):
            self.found.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("served", ["qwen3_vl, two layers attend"], indirect=True)
def test_a_step_that_decodes_asks_the_host_for_nothing(served, monkeypatch):
    """As far as a CPU can tell of what a CUDA graph can hold."""
    model, mixed, decoding = served.model(), [], []
    monkeypatch.setattr(model, "has_graphs", True)
    forward = model.forward

    def watched(*args, **kwargs):
        metadata = get_forward_context().attn_metadata[next(iter(model.states.values())).name]
        with AsksTheHost() as mode:
            output = forward(*args, **kwargs)
        (mixed if metadata.num_prefills else decoding).append(mode.found)
        return output

    monkeypatch.setattr(model, "forward", watched)
    served.check_all([served.request(seed) for seed in (5001, 5003)])
    assert len(decoding) > 3 and not any(decoding) and all(mixed)


def test_graphs_are_captured_of_decoding_steps_only_and_only_if_asked_for():
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    from linmu.optimized.serving.vllm_plugin.metadata import StateMetadataBuilder
    from linmu.optimized.serving.vllm_plugin.settings import choose_graphs

    def chosen(mode):
        compilation = SimpleNamespace(cudagraph_mode=mode, mode=CompilationMode.VLLM_COMPILE)
        model = SimpleNamespace(enforce_eager=False)
        choose_graphs(SimpleNamespace(compilation_config=compilation, model_config=model))
        return model.enforce_eager, compilation.mode

    assert chosen(None)[0] and chosen(CUDAGraphMode.NONE)[0]
    assert chosen(CUDAGraphMode.FULL_DECODE_ONLY) == (False, CompilationMode.NONE)
    with pytest.raises(ValueError, match="must be NONE or FULL_DECODE_ONLY"):
        chosen(CUDAGraphMode.FULL_AND_PIECEWISE)
    support = StateMetadataBuilder.get_cudagraph_support(None, None)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def rounded_to_fp8(weight: torch.Tensor, scale: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllm._custom_ops.scaled_fp8_quant` on a GPU."""
    wide = (weight.float() / scale).clamp(-448, 448)
    return wide.to(torch.float8_e4m3fn), scale


def test_fp8_rounds_the_mlps_and_leaves_the_blocks(tmp_path, monkeypatch):
    """vLLM's kernel of a CPU multiplies them but does not round; its sizes are multiples of 32."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("vllm._custom_ops.scaled_fp8_quant", rounded_to_fp8)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08}
    special = {"bos_token_id": None, "eos_token_id": None}
    teacher = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads, **special))
    shake_mixers(convert(teacher.bfloat16(), {"text_window": 6})).save_pretrained(tmp_path)
    student = load(str(tmp_path)).eval()
    prompts = [[(7 * i * i + 3 * j * j + j) % 256 for j in range(5 + 3 * i)] for i in range(12)]
    options = {"model": str(tmp_path), "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 256}
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=20, detokenize=False)
    errors = {}
    for quantization in (None, "fp8"):
        engine = vllm.LLM(**options, quantization=quantization, max_num_seqs=16, gpu_memory_utilization=0.3)
        model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
        kinds = {name: weight.dtype for name, weight in model.named_parameters()}
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = []
        for prompt, output in zip(prompts, engine.generate(given, sampling, use_tqdm=False), strict=True):
            with torch.no_grad():
                wanted = student(input_ids=torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
            pairs = output.outputs[0].logprobs[0].items()
            found += [abs(each.logprob - wanted[token].item()) for token, each in pairs]
        errors[quantization] = sum(found) / len(found)
        engine.llm_engine.engine_core.shutdown()
        del engine, model
        cleanup_dist_env_and_memory()
    rounded = {name for name, kind in kinds.items() if kind == torch.float8_e4m3fn}
    assert rounded == {name for name in kinds if ".mlp." in name and name.endswith("proj.weight")}
    assert errors[None] < 0.03 < errors["fp8"] < 0.1, errors


def test_states_in_bfloat16_are_rounded_and_nothing_else(tmp_path, monkeypatch):
    """They are half as large, the answers near those of float32. vLLM turns its option to float32 on a CPU,
    so that what the plugin makes of it is changed there.
    """
    from linmu.optimized.serving.vllm_plugin import layer, models

    student, processor = tiny_student("qwen2", None)
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "dtype": "float32", "max_model_len": LONGEST, "max_num_seqs": AT_ONCE}
    requests, found, bytes_a_row = [request_at_random(seed, KINDS[:1]) for seed in range(20)], {}, {}
    for kind in ("auto", "bfloat16"):
        if kind != "auto" and not torch.cuda.is_available():
            for module in (layer, models):
                monkeypatch.setattr(module, "scan_dtype", lambda config: torch.bfloat16)
        engine = vllm.LLM(**options, mamba_ssm_cache_dtype=kind, gpu_memory_utilization=0.3)
        model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
        pools = dict(zip(model.states[0].names, model.states[0].kv_cache, strict=True))
        bytes_a_row[kind] = pools["scan"][0].nbytes
        assert {name for name, pool in pools.items() if pool.dtype == torch.bfloat16} == (
            {"scan"} if kind == "bfloat16" else set()
        )
        given = [request.for_vllm() for request in requests]
        outputs = engine.generate(given, [sampling(request) for request in requests], use_tqdm=False)
        found[kind] = [output.outputs[0] for output in outputs]
        engine.llm_engine.engine_core.shutdown()
        del engine, model, pools
        cleanup_dist_env_and_memory()
    assert bytes_a_row["auto"] == 2 * bytes_a_row["bfloat16"]
    errors = []
    for want, got in zip(found["auto"], found["bfloat16"], strict=True):
        for token, at, other in zip(want.token_ids, want.logprobs, got.logprobs, strict=True):
            if token not in other:  # answers part here
                break
            errors.append(abs(at[token].logprob - other[token].logprob))
    assert len(errors) > 40 and 0 < sum(errors) / len(errors) < 0.02 and max(errors) < 0.2, errors
