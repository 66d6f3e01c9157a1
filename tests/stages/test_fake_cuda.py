"""What runs on a GPU, on fake tensors: devices, dtypes and shapes of the paper's models at a vocabulary of 151,936."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.generator import STOP_IDS, VOCABULARY, generate
from eopd.stages.align.divergence import LoadedModel, compare, read_pairs
from eopd.stages.engines import hidden as hidden_transformers
from eopd.stages.engines import sampling_transformers
from eopd.stages.engines.sampling import EngineOptions, SamplingParameters, SamplingRequest
from eopd.stages.job import ModelRef
from eopd.stages.memory import ModelSize, reading, score_rows, training
from eopd.stages.models import packing as backbone
from eopd.stages.models.lm_head import LMHead, traits_of, unwrap
from eopd.stages.models.packing import PACKED, Sequence
from eopd.stages.models.transfer import copied_at_once
from eopd.stages.rollout.student_topk import topk_of
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_statistics import TokenBatch, row_keys
from eopd.stages.train import student as student_head
from eopd.stages.train.loop import Loop
from eopd.stages.train.lora import add_adapters
from eopd.stages.train.objectives.base import StepContext, TeacherBatch
from eopd.stages.train.objectives.registry import BUILDERS, make_objective
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.optimizer import Ema, load_optimizer_tensors, make_optimizer, optimizer_tensors
from eopd.stages.train.responses import Responses
from eopd.stages.train.settings import TrainSettings
from eopd.stages.train.states import RoundStart
from eopd.stages.train.stops import StopHandling
from eopd.stages.train.student import Student, sparse_head_loss
from eopd.storage.teacher_record import HeadRule, TeacherRows
from tests.stages.fake_cuda import QWEN3, FakeCuda, fake_cuda, qwen3

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from eopd.storage.teacher_cache import TeacherCache

EXTRA = 4
STOPS = StopHandling("class", STOP_IDS[:1], STOP_IDS[::-1])
RULES = {
    "beyond_head": HeadRule(),
    "full": HeadRule(draws="full", n_draws=50),
    "none": HeadRule(draws="none"),
}


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        device.count = EXTRA
        yield device


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


def head_of(size: str, dtype: torch.dtype = torch.bfloat16, *, grad: bool = False) -> LMHead:
    return LMHead(on_gpu(VOCABULARY, QWEN3[size][0], dtype=dtype, grad=grad), None, 1.0, None, VOCABULARY)


@lru_cache
def rows_of(tokens: int, draws: str = "beyond_head") -> TeacherRows:
    if draws != "full":
        return generate(tokens, RULES[draws])
    count = RULES["full"].n_draws
    ids = np.random.default_rng(0).integers(0, VOCABULARY, tokens * count).astype(np.int32)
    return replace(rows_of(tokens, "none"), draw_ids=ids, draw_offsets=np.arange(tokens + 1) * count)


# -- scoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", RULES)
@pytest.mark.parametrize("extra", [0, EXTRA])
def test_statistics_of_an_8b_teacher(gpu: FakeCuda, draws: str, extra: int) -> None:
    tokens = 1100  # a chunk and a shorter one
    head = StatisticsHead(head_of("8b"), RULES[draws], temperature=0.7, stop_ids=STOP_IDS)
    keys = row_keys(0, (1,), np.arange(tokens))
    counts = np.full(tokens, extra) if extra else None
    asked = TokenBatch(np.zeros(tokens, np.int64), keys, counts, np.zeros(tokens * extra, np.int64) if extra else None)
    statistics = head(on_gpu(tokens, QWEN3["8b"][0]), asked)
    assert statistics.entropy.shape == (tokens,)
    assert statistics.stop_logprobs.shape == (tokens, len(STOP_IDS))
    assert len(statistics.extra_logprobs) == tokens * extra
    assert statistics.head_ids.dtype == np.int32


@pytest.mark.parametrize("draws", RULES)
def test_a_chunk_of_scoring_reads_back_once(gpu: FakeCuda, draws: str) -> None:
    tokens = 1900  # three chunks
    head = StatisticsHead(head_of("8b"), RULES[draws], stop_ids=STOP_IDS)
    hidden, asked = (
        on_gpu(tokens, QWEN3["8b"][0]),
        TokenBatch(np.zeros(tokens, np.int64), row_keys(0, (1,), np.arange(tokens))),
    )
    gpu.copies.clear()
    gpu.syncs.clear()
    head(hidden, asked)
    chunks = -(-tokens // score_rows(VOCABULARY, on_gpu=True))
    assert chunks == 3
    assert gpu.copies["to_host"] == chunks
    assert gpu.copies["to_device"] <= 2 * chunks  # sampled ids and uniform numbers
    assert gpu.syncs.total() <= 6 * chunks


def test_hidden_states_are_read_with_one_copy_a_batch(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_transformers, "load_model", lambda *_: gpu.model(qwen3("8b", 1), torch.bfloat16))
    options = EngineOptions(device="cuda")
    engine = hidden_transformers.TransformersHiddenEngine(
        ModelRef("teacher"), options=options, batch_tokens=4096, row_tokens=2048
    )
    sequences = [Sequence(range(30), range(900)) for _ in range(8)]
    list(engine.hidden(sequences[:1]))  # chooses the layout, once for a model
    gpu.copies.clear()
    gpu.syncs.clear()
    batches = list(engine.hidden(sequences))
    assert gpu.copies == {"to_device": len(batches)}
    assert not gpu.syncs


def test_hidden_states_by_the_transformers_engine(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_transformers, "load_model", lambda ref, _: gpu.model(qwen3("8b", 2), torch.bfloat16))
    options = EngineOptions(device="cuda")
    engine = hidden_transformers.TransformersHiddenEngine(
        ModelRef("teacher"), options=options, batch_tokens=4096, row_tokens=2048
    )
    sequences = [Sequence(range(30), range(length)) for length in (2000, 900, 300, 40)]
    batches = list(engine.hidden(sequences))
    assert sum(len(batch.hidden) for batch in batches) == 3240
    assert {(batch.hidden.device.type, batch.hidden.dtype) for batch in batches} == {("cuda", torch.bfloat16)}
    assert engine.note == ""


def test_alignment_of_a_student_with_its_teacher(gpu: FakeCuda) -> None:
    pair = [LoadedModel(gpu.model(qwen3(size, 1), torch.bfloat16)) for size in ("8b", "0.6b")]
    sequences = [Sequence(range(20), range(length)) for length in (150, 60)]
    (first, figures), (second, _) = read_pairs(*pair, sequences, sequences, 0.7, STOP_IDS, batch_tokens=4096)
    assert (first, second) == (0, 1)
    assert figures.fkl.shape == (150,)


def test_alignment_refuses_to_mix_devices(gpu: FakeCuda) -> None:
    teacher, student = (on_gpu(8, 4096), head_of("8b")), (on_gpu(8, 1024), head_of("0.6b"))
    assert compare(teacher, student).tokens == 8
    elsewhere = LMHead(torch.empty(VOCABULARY, 1024), None, 1.0, None, VOCABULARY)
    with pytest.raises(RuntimeError, match="cpu"):
        elsewhere.logits(student[0])


# -- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampling_by_the_transformers_engine(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, top_p: float) -> None:
    module = sampling_transformers
    monkeypatch.setattr(module, "load_model", lambda *_: gpu.model(qwen3("0.6b", 1), torch.bfloat16))
    monkeypatch.setattr(module, "model_folder", lambda *_: Path("student"))
    monkeypatch.setattr(module, "check_model_length", lambda *_: None)
    monkeypatch.setattr(module, "refuse_crossing", lambda *_: None)
    monkeypatch.setattr(module, "_takes_padding", lambda _: True)  # compares logits, which fake tensors do not have
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (80 << 30, 80 << 30))
    engine = module.TransformersSamplingEngine(
        ModelRef("student"), max_model_len=4096, options=EngineOptions(device="cuda")
    )
    requests = [SamplingRequest(range(5, 20), 1), SamplingRequest(range(5, 9), 2)]
    samples = engine.sample(requests, SamplingParameters(top_p=top_p, max_new_tokens=5, stop_ids=STOP_IDS))
    assert [sample.logprobs.dtype for sample in samples if sample.logprobs is not None] == 2 * [np.float32]


def test_most_probable_ids_of_a_student(gpu: FakeCuda) -> None:
    model = gpu.model(qwen3("1.7b", 1), torch.bfloat16)
    topk = topk_of(model, [Sequence(range(9), range(700)), Sequence(range(9), range(90))], 16, 1.0, "cuda")
    assert topk.ids.shape == (790, 16)


# -- training ------------------------------------------------------------------------------------------------------


def context_of(tokens: int, *, weighed: bool = False) -> StepContext:
    per_token = {"device": "cuda", "dtype": torch.float32}
    return StepContext(
        mask=torch.ones(tokens, **per_token),
        normaliser=float(tokens),
        q_old=torch.zeros(tokens, **per_token),
        student_entropy_round=torch.zeros(tokens, **per_token),
        entropy_threshold=0.5,
        unsure=torch.zeros(tokens, dtype=torch.bool, device="cuda"),
        token_key=torch.zeros(tokens, dtype=torch.int64, device="cuda"),
        weight=torch.ones(tokens, **per_token) if weighed else None,
    )


@pytest.mark.parametrize(
    ("name", "stops"), [*((name, "class") for name in sorted(BUILDERS)), ("eopd", "remap"), ("jsd", "remap")]
)
def test_student_head(gpu: FakeCuda, name: str, stops: Literal["class", "remap"]) -> None:
    objective = make_objective(ObjectiveSettings(name=name, **({} if stops == "class" else {"stops": stops})))
    draws = objective.plan.draws if objective.plan.draws in RULES else "beyond_head"
    tokens = 600  # two chunks
    handling = StopHandling(stops, STOP_IDS[:1], STOP_IDS[::-1])
    batch = TeacherBatch.build(rows_of(tokens, draws), RULES[draws], handling, objective.plan, VOCABULARY, "cuda")
    hidden, head = on_gpu(tokens, 1024, dtype=torch.float32, grad=True), head_of("0.6b", torch.float32, grad=True)
    context = context_of(tokens, weighed=True)
    gpu.copies.clear()
    with torch.autocast("cuda", torch.bfloat16):
        loss, metrics = sparse_head_loss(hidden, head, batch, objective, context)
    loss.backward()
    for leaf in (hidden, head.weight):
        assert leaf.grad is not None
        assert (leaf.grad.device, leaf.grad.dtype, leaf.grad.shape) == (leaf.device, leaf.dtype, leaf.shape)
    assert {value.device.type for value in metrics.values()} == {"cuda"}
    assert not gpu.copies
    assert not gpu.syncs


class OneGpu:
    """The ``Accelerator`` of a single process."""

    device = torch.device("cuda", 0)
    num_processes, process_index, is_main_process = 1, 0, True

    def reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def no_sync(self, _: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


class Scores:
    """A ``TeacherCache`` in memory: teacher rows of each response."""

    def __init__(self, lengths: Seq[int], draws: str = "beyond_head") -> None:
        self.rows = [rows_of(length, draws) for length in lengths]
        self.coverage = SimpleNamespace(head=RULES[draws])

    def read(self, locations: Seq[tuple[int, int]]) -> TeacherRows:
        return joined([self.rows[number] for _, number in locations])

    def responses(self) -> Responses:
        sequences = tuple(Sequence(range(40), rows.token_ids.tolist()) for rows in self.rows)
        count, offsets = len(sequences), np.cumsum([0, *(rows.tokens for rows in self.rows)])
        names = tuple(f"p{number}/0" for number in range(count))
        places = tuple((0, number) for number in range(count))
        return Responses(names, sequences, places, count * (None,), offsets, np.zeros(offsets[-1], np.int8))


def joined(pieces: Seq[TeacherRows]) -> TeacherRows:
    """Rows of several responses, one after the other."""
    fields: dict[str, Any] = {}
    for name in vars(pieces[0]):
        values = [getattr(piece, name) for piece in pieces]
        if name == "stop_ids":
            fields[name] = values[0]
        elif name == "response_offsets":
            fields[name] = np.cumsum([0, *(piece.tokens for piece in pieces)])
        elif name.endswith("_offsets"):
            fields[name] = np.cumsum(np.concatenate([[0], *(np.diff(value) for value in values)]))
        else:
            fields[name] = np.concatenate(values)
    return TeacherRows(**fields)


def loop_of(gpu: FakeCuda, size: str, lengths: Seq[int], *, layers: int = 2, **settings: Any) -> Loop:
    """A training loop over responses of these lengths, whose student has a few layers."""
    train = TrainSettings.model_validate(
        {
            "autocast": "bf16",
            "batch_responses": len(lengths),
            "row_tokens": 1024,
            "micro_batch_tokens": 4096,
            **settings,
        }
    )

    def adapt(model: PreTrainedModel) -> Any:
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model if train.lora is None else add_adapters(model, train.lora, seed=0, round_=0)

    model = gpu.model(qwen3(size, layers), getattr(torch, train.param_dtype), adapt).train()
    traits_of(unwrap(model))
    backbone._LAYOUTS[unwrap(model)] = PACKED  # measured in the test of the engine
    objective = make_objective(train.objective)
    scores = Scores(lengths, objective.plan.draws if objective.plan.draws in RULES else "beyond_head")
    student = Student(model, objective, train.head_chunk_tokens, autocast=train.autocast == "bf16")
    gpu.number = 2.0  # of a gradient's norm, which is then scaled down
    return Loop(
        student,
        make_optimizer(student, train.optimizer),
        objective,
        scores.responses(),
        cast("TeacherCache", scores),
        STOPS,
        cast("Accelerator", OneGpu()),
        train,
        seed=0,
        round_=1,
        first_step=0,
        total_steps=10,
        temperature=1.0,
        ema=None if train.ema is None else Ema(student, train.ema),
    )


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ("0.6b", {"gradient_checkpointing": True, "ema": 0.99}),
        ("1.7b", {"objective": {"name": "reopold"}}),
        ("4b", {"gradient_checkpointing": True, "lora": {"rank": 8}}),
        ("0.6b", {"param_dtype": "bfloat16", "objective": {"name": "jsd"}}),
    ],
)
def test_a_round_of_training(gpu: FakeCuda, size: str, settings: dict[str, Any]) -> None:
    loop = loop_of(gpu, size, (700, 650, 400, 100), **settings)
    start = loop.round_start(lambda _: None)
    assert start.logprob.shape == (1850,)
    start = replace(start, weight=np.ones(1850, np.float32))
    figures = loop.take(loop.load_step(0), start)
    assert {"loss", "grad_norm", "tokens"} <= figures.keys()
    trained = [parameter for parameter in loop.student.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert {loop.optimizer.state[parameter]["exp_avg"].device.type for parameter in trained} == {"cuda"}


def test_optimiser_states_return_to_the_device(gpu: FakeCuda) -> None:
    loop = loop_of(gpu, "0.6b", (50,), ema=0.9)
    loop.take(loop.load_step(0), loop.round_start(lambda _: None))
    stored = optimizer_tensors(loop.student, loop.optimizer)
    assert {tensor.device.type for tensor in stored.values()} == {"cpu"}
    load_optimizer_tensors(loop.student, loop.optimizer, stored)
    assert loop.ema is not None
    loop.ema.load(loop.ema.tensors())
    loop.take(loop.load_step(0), loop.round_start(lambda _: None))


@pytest.mark.parametrize(
    ("name", "budget", "micro_batches"), [*((name, 4096, 1) for name in sorted(BUILDERS)), ("eopd", 1024, 3)]
)
def test_a_step_copies_each_micro_batch_at_once_and_waits_once(
    gpu: FakeCuda, name: str, budget: int, micro_batches: int
) -> None:
    loop = loop_of(
        gpu, "0.6b", (900, 1000, 700), layers=1, ema=0.9, micro_batch_tokens=budget, objective={"name": name}
    )
    start = RoundStart(*(np.ones(2600, np.float32) for _ in range(3)))
    loop.take(loop.load_step(0), start)  # what the round needs once
    gpu.copies.clear()
    gpu.syncs.clear()
    step = loop.load_step(0)
    loop.take(step, start)
    assert len(step.micro_batches) == micro_batches
    assert gpu.copies == {"to_device": micro_batches, "to_host": 1}
    assert not gpu.syncs


@pytest.mark.parametrize("tokens", [1700, 3400])
def test_a_chunk_writes_the_gradient_of_the_weight_once(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(student_head, "gpu_bytes", lambda _: 80 << 30)
    hidden, head = on_gpu(tokens, 1024, grad=True), head_of("0.6b", torch.float32, grad=True)
    objective = make_objective(ObjectiveSettings(name="eopd"))
    rule = RULES["beyond_head"]
    batch = TeacherBatch.build(rows_of(tokens), rule, STOPS, objective.plan, VOCABULARY, "cuda")
    gpu.written.clear()
    with torch.autocast("cuda", torch.bfloat16):
        sparse_head_loss(hidden, head, batch, objective, context_of(tokens))
    chunks = -(-tokens // 1760)
    assert gpu.written[head.weight.shape] == chunks + 1  # and once the weight in bfloat16
    assert gpu.peak < 2**30 + 3 * head.weight.nbytes + 2**30


def test_what_is_copied_at_once_is_the_same() -> None:
    tensors = [
        torch.arange(7),
        torch.rand(3, 5, dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.zeros(0, 4),
        torch.rand(4, 6, dtype=torch.float32).T,
        torch.rand(5).bfloat16(),
    ]
    for copy, tensor in zip(copied_at_once(tensors, "cpu"), tensors, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


# -- predicted memory ----------------------------------------------------------------------------------------------

MEMORY = [
    ("0.6b", 4, {"gradient_checkpointing": True}),
    ("0.6b", 4, {}),
    ("0.6b", 3, {"param_dtype": "bfloat16"}),
    ("0.6b", 4, {"lora": {"rank": 8}}),
    ("4b", 3, {"gradient_checkpointing": True, "micro_batch_tokens": 1024}),
]


@pytest.mark.parametrize(("size", "layers", "settings"), MEMORY)
def test_predicted_memory_of_training(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, size: str, layers: int, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(student_head, "gpu_bytes", lambda _: 80 << 30)
    lengths = (980, 980, 980, 980)
    loop = loop_of(gpu, size, lengths, layers=layers, **settings)
    start = RoundStart(*(np.ones(sum(lengths), np.float32) for _ in range(2)))
    for _ in range(2):  # the first makes the moments
        gpu.peak = gpu.allocated
        loop.take(loop.load_step(0), start)
    shapes = ModelSize.of(qwen3(size, layers).to_dict())
    assert shapes is not None
    memory = training(shapes, loop.settings, longest=1020, gpu_bytes=80 << 30, step_tokens=4 * 1020)
    assert memory.bytes - memory.parts["context"] == pytest.approx(gpu.peak, rel=0.1)


@pytest.mark.parametrize("size", ["8b", "0.6b"])
def test_predicted_memory_of_scoring(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setattr(hidden_transformers, "load_model", lambda *_: gpu.model(qwen3(size, 2), torch.bfloat16))
    options = EngineOptions(device="cuda")
    engine = hidden_transformers.TransformersHiddenEngine(
        ModelRef("teacher"), options=options, batch_tokens=8192, row_tokens=1024
    )
    gpu.peak = gpu.allocated
    head = StatisticsHead(engine.head, HeadRule(), stop_ids=STOP_IDS)
    for batch in engine.hidden([Sequence(range(40), range(985)) for _ in range(8)]):
        count = len(batch.hidden)
        head(batch.hidden, TokenBatch(np.zeros(count, np.int64), row_keys(0, (1,), np.arange(count))))
    shapes = ModelSize.of({**qwen3(size, 2).to_dict(), "dtype": "bfloat16"})
    assert shapes is not None
    memory = reading(
        shapes, "auto", "transformers", options, tokens=8192, row_tokens=1024, longest=1024, gpu_bytes=80 << 30
    )
    assert memory.bytes - memory.parts["context"] == pytest.approx(gpu.peak, rel=0.1)


def test_parameters_are_counted_from_the_config(gpu: FakeCuda) -> None:
    for size in QWEN3:
        model = gpu.model(qwen3(size, 2), torch.bfloat16)
        shapes = ModelSize.of(qwen3(size, 2).to_dict())
        assert shapes is not None
        assert shapes.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-4)
