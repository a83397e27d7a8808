"""Pooled histories, compressed embeddings and their drift, against loops in float64."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CPU, tables
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.fx import Tracer
from torchrec.streamable import Pipelineable

from torchrec_exfm.history import EmbeddingCompressor, HistoryPooling, embedding_drift

V, Q = 3, 4
LENGTHS = [2, 0, 1, 5, 0, 200, 3, 0]
POOLINGS = ("mean", "sum", "attention")
# Rounding of a sum of n terms, each of a few operations: |error| <= (n + k) u sum |terms|.
U = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8}


def history_of(lengths: list[int], seed: int = 0, **options: Any) -> JaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), V, generator=generator, dtype=torch.float64)
    return JaggedTensor(values.to(**options), lengths=torch.tensor(lengths, dtype=torch.int64))


def pooling_of(way: str, dtype: torch.dtype = torch.float64) -> HistoryPooling:
    torch.manual_seed(1)
    return HistoryPooling(V, way, query_width=Q).to(dtype)  # type: ignore[arg-type]


def queries_of(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, Q, generator=generator, dtype=torch.float64).to(dtype)


def by_loops(
    way: str, values: Any, lengths: list[int], queries: Any, matrix: Any
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Return pooled rows, and gradients of sum (b + 1) (v + 1) out_bv by values and queries."""
    pooled, slopes, query_slopes, start = [], [], [], 0
    for b, length in enumerate(lengths):
        rows = values[start : start + length]
        start += length
        up = [(b + 1) * (v + 1) for v in range(V)]
        if way != "attention":
            scale = 1 / length if way == "mean" and length else 1.0
            pooled.append([scale * math.fsum(row[v] for row in rows) for v in range(V)])
            slopes += [[scale * u for u in up]] * length
            query_slopes.append([0.0] * Q)
            continue
        key = [math.fsum(matrix[v][q] * queries[b][q] for q in range(Q)) for v in range(V)]
        scores = [math.fsum(map(float.__mul__, row, key)) / math.sqrt(V) for row in rows]
        top = max(scores, default=0.0)
        total = math.fsum(math.exp(score - top) for score in scores)
        weights = [math.exp(score - top) / total for score in scores]
        out = [math.fsum(w * r[v] for w, r in zip(weights, rows, strict=True)) for v in range(V)]
        pooled.append(out)
        by_score = [  # softmax: w_i (up . (v_i - out))
            w * math.fsum(up[v] * (row[v] - out[v]) for v in range(V)) / math.sqrt(V)
            for w, row in zip(weights, rows, strict=True)
        ]
        slopes += [
            [w * u + s * k for u, k in zip(up, key, strict=True)]
            for w, s in zip(weights, by_score, strict=True)
        ]
        by_key = [
            math.fsum(map(float.__mul__, by_score, column))
            for column in (zip(*rows, strict=True) if rows else [()] * V)
        ]
        columns = zip(*matrix, strict=True)
        query_slopes.append([math.fsum(map(float.__mul__, by_key, column)) for column in columns])
    return pooled, slopes, query_slopes


def moved_by_scores(module: HistoryPooling, history: JaggedTensor, queries: Tensor) -> float:
    """Bound the effect of rounding q, W and W q to bfloat16 on a mean of vectors.

    Scores then differ by e <= (3 + 4 + 1) u max_i |v_i| |W| |q| / sqrt(V), as sums of 4 products
    may be in bfloat16; weights of a softmax by a part e^2e - 1 at most.
    """
    assert module.project is not None
    keys = queries.double().abs() @ module.project.weight.detach().double().abs().T
    values = history.values().double().abs()
    scores = (values * keys.repeat_interleave(history.lengths(), 0)).sum(1) / math.sqrt(V)
    return math.expm1(2 * 8 * U[torch.bfloat16] * float(scores.max())) * float(values.max())


def upstream(rows: int) -> Tensor:
    return torch.outer(torch.arange(1, rows + 1), torch.arange(1, V + 1)).double()


# ---- Pooling ----


@pytest.mark.parametrize("way", POOLINGS)
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [0, 0], [4, 3], [0, 1, 0]])
def test_pooling_is_that_of_loops_with_gradients(way: str, lengths: list[int]) -> None:
    module, history, queries = pooling_of(way), history_of(lengths), queries_of(len(lengths))
    values = history.values().requires_grad_()
    queries.requires_grad_()
    matrix = module.project.weight.tolist() if module.project is not None else None
    out = module(history, queries)
    (out * upstream(len(lengths))).sum().backward()
    pooled, slopes, query_slopes = by_loops(way, values.tolist(), lengths, queries.tolist(), matrix)
    # 200 sums and some 20 operations on numbers below 10 (of a sum, 100); in a gradient they are
    # times (b + 1) (v + 1) <= 24
    bound = 220 * U[torch.float64] * 10
    torch.testing.assert_close(out.tolist(), pooled, rtol=0, atol=bound * 10)
    assert values.grad is not None
    torch.testing.assert_close(values.grad.tolist(), slopes, rtol=0, atol=bound * 240)
    if way == "attention":
        assert queries.grad is not None
        torch.testing.assert_close(queries.grad.tolist(), query_slopes, rtol=0, atol=bound * 240)
    else:
        assert queries.grad is None
    for b, length in enumerate(lengths):
        assert length or not out[b].any()
        assert length or queries.grad is None or not queries.grad[b].any()


@pytest.mark.parametrize("way", POOLINGS)
def test_examples_do_not_touch_each_other(way: str) -> None:
    """No number of one example, NaN included, changes another's output or gradient by a bit."""
    history, queries, module = history_of([3, 2, 4]), queries_of(3), pooling_of(way)
    expected = module(history, queries)
    values = history.values().clone()
    values[3:5] = torch.nan
    values.requires_grad_()
    out = module(JaggedTensor(values, lengths=history.lengths()), queries)
    assert torch.equal(out[[0, 2]], expected[[0, 2]]) and out[1].isnan().all()
    out[[0, 2]].sum().backward()
    assert values.grad is not None and values.grad[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()


def test_scores_of_any_size_do_not_overflow() -> None:
    values = torch.tensor([[1e4, 0, 0], [-1e4, 0, 0], [-1e4, 0, 0], [-2e4, 0, 0]]).requires_grad_()
    module = HistoryPooling(V, "attention", query_width=V)
    assert module.project is not None
    nn.init.eye_(module.project.weight)
    history = JaggedTensor(values, lengths=torch.tensor([2, 2]))
    out = module(history, torch.tensor([[1e4, 0, 0]] * 2))
    assert out[:, 0].tolist() == [1e4, -1e4]  # all weight on the first of each
    out.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("way", POOLINGS)
def test_half_precision_is_added_up_in_float32(way: str) -> None:
    """1000 ones and a small number: bfloat16 would stop at 256."""
    values = torch.ones(1000, V, dtype=torch.bfloat16)
    history = JaggedTensor(values, lengths=torch.tensor([1000]))
    out = pooling_of(way, torch.bfloat16)(history, queries_of(1, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    expected = 1000.0 if way == "sum" else 1.0
    torch.testing.assert_close(out.float(), torch.full((1, V), expected), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("way", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_near_float64(way: str, dtype: torch.dtype) -> None:
    history, queries = history_of(LENGTHS, dtype=dtype), queries_of(len(LENGTHS), dtype)
    module = pooling_of(way, dtype)
    out = module(history, queries)
    assert out.dtype == dtype
    exact = JaggedTensor(history.values().double(), lengths=history.lengths())
    expected = copy.deepcopy(module).double()(exact, queries.double())
    size = HistoryPooling(V, "sum")(JaggedTensor(exact.values().abs(), lengths=exact.lengths()))
    # a rounding of the result, float32's of the sum, and those of W q
    bound = U[dtype] * expected.abs() + 220 * U[torch.float32] * size
    if way == "attention":
        bound += moved_by_scores(module, history, queries) * U[dtype] / U[torch.bfloat16]
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("way", POOLINGS)
def test_under_autocast(way: str) -> None:
    """The linear layer gives bfloat16, and what is added up stays as it is."""
    history, queries = history_of(LENGTHS, dtype=torch.float32), queries_of(8, torch.float32)
    module = pooling_of(way, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(history, queries)
    assert out.dtype == torch.float32
    bound = moved_by_scores(module, history, queries) if way == "attention" else 0.0
    assert ((out - module(history, queries)).abs() <= bound).all()


def test_offsets_int32_and_no_examples() -> None:
    history, module = history_of(LENGTHS), pooling_of("mean")
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    assert torch.equal(module(JaggedTensor(history.values(), offsets=offsets)), module(history))
    for way in POOLINGS:
        out = pooling_of(way)(history_of([]), queries_of(0))
        assert out.shape == (0, V)


def test_what_is_refused() -> None:
    history, attention = history_of([2, 1]), pooling_of("attention")
    with pytest.raises(ValueError, match=r"width 4, .* received values of shape \(3, 3\)"):
        HistoryPooling(4)(history)
    with pytest.raises(ValueError, match=r"have 2 queries .* \(3, 3\) and 3 queries"):
        attention(history, queries_of(3))
    with pytest.raises(ValueError, match=r"have 2 queries .* and 0 queries"):
        attention(history)
    for arguments in ({"pooling": "max"}, {"pooling": "attention"}, {"width": 0}):
        with pytest.raises(ValueError, match=r"pooling should be one of .*; received"):
            HistoryPooling(**{"width": V, **arguments})  # type: ignore[arg-type]
    for lengths in ([1, 1], [2, 2]):
        for way in POOLINGS:
            bad = JaggedTensor(history.values(), lengths=torch.tensor(lengths))
            with pytest.raises(RuntimeError, match=r"lengths|size"):
                pooling_of(way)(bad, queries_of(2))


# ---- Traced, compiled, exported, pipelined ----


@pytest.mark.parametrize("way", POOLINGS)
@pytest.mark.parametrize("tracer", [torch.fx.Tracer, Tracer])
def test_traced_by_fx(way: str, tracer: type[torch.fx.Tracer]) -> None:
    module = pooling_of(way)
    traced = torch.fx.GraphModule(module, tracer().trace(module))
    for lengths in (LENGTHS, [1, 0]):
        history, queries = history_of(lengths), queries_of(len(lengths))
        assert torch.equal(traced(history, queries), module(history, queries))
    with pytest.raises(ValueError, match="received values"):
        traced(JaggedTensor(torch.ones(3, V + 1), lengths=torch.tensor([3])), queries_of(1))


class Tensors(nn.Module):
    """Takes values and lengths as tensors, as compilation and export need."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.pooling = pooling_of(way)

    def forward(self, values: Tensor, lengths: Tensor, queries: Tensor) -> Tensor:
        pooled: Tensor = self.pooling(JaggedTensor(values, lengths=lengths), queries)
        return pooled


def arguments_of(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    history = history_of(lengths)
    return history.values(), history.lengths(), queries_of(len(lengths))


@pytest.mark.parametrize("way", POOLINGS)
def test_compiled_whole_and_once_with_gradients(way: str) -> None:
    module, graphs = Tensors(way), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for lengths in (LENGTHS, [4, 0, 3]):
        values, *others = arguments_of(lengths)
        slopes = []
        for function in (compiled, module):
            leaf = values.clone().requires_grad_()
            out = function(leaf, *others)
            (out * upstream(len(lengths))).sum().backward()
            slopes.append((out, leaf.grad))
        assert torch.equal(slopes[0][0], slopes[1][0]) and torch.equal(slopes[0][1], slopes[1][1])
    assert len(graphs) == 1


@pytest.mark.parametrize("way", POOLINGS)
def test_exported_for_any_number_of_examples(way: str) -> None:
    module, many = Tensors(way), torch.export.Dim.DYNAMIC
    program = torch.export.export(module, arguments_of(LENGTHS), dynamic_shapes=[{0: many}] * 3)
    for lengths in (LENGTHS, [4, 0, 3], [0, 0]):
        arguments = arguments_of(lengths)
        assert torch.equal(program.module()(*arguments), module(*arguments))


def test_the_compressor_is_compiled_and_traced() -> None:
    torch.manual_seed(0)
    compressor, embeddings = EmbeddingCompressor(6, 4), torch.randn(3, 6)
    compiled = torch.compile(compressor.loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(embeddings), compressor.loss(embeddings))
    assert torch.equal(torch.fx.symbolic_trace(compressor)(embeddings), compressor(embeddings))


class Batch(Pipelineable):
    def __init__(self, ids: KeyedJaggedTensor, history: JaggedTensor, clicked: Tensor) -> None:
        self.ids, self.history, self.clicked = ids, history, clicked

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        parts = (self.ids, self.history, self.clicked)
        return Batch(*(part.to(device=device, non_blocking=non_blocking) for part in parts))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.ids, self.history, self.clicked):
            part.record_stream(stream)


class Student(nn.Module):
    """Tables, and a teacher's memory that is attended to with queries from the tables."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = tables()
        self.memory = HistoryPooling(V, way, query_width=12)  # type: ignore[arg-type]
        self.over = nn.Linear(12 + V, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.tables(batch.ids)
        sparse = torch.cat([pooled[name] for name in ("f0", "f1", "f2")], dim=1)
        memory = self.memory(batch.history, sparse)
        logits = self.over(torch.cat([sparse, memory], dim=1)).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logits, batch.clicked)
        return loss, logits.detach()


def batches_of(steps: int, rows: int = 6) -> Iterator[Batch]:
    for step in range(steps):
        torch.manual_seed(step)
        lengths = torch.randint(0, 4, (rows,)).tolist()
        ids = KeyedJaggedTensor(
            ["f0", "f1", "f2"],
            torch.randint(0, 20, (3 * rows,)),
            lengths=torch.ones(3 * rows).int(),
        )
        history = history_of(lengths, step, dtype=torch.float32)
        yield Batch(ids, history, torch.rand(rows).round())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("way", POOLINGS)
def test_in_torchrecs_pipeline(way: str) -> None:
    """With pipelined tables it equals a loop, to the bit."""
    logits = []
    for pipelined in (True, False):
        model = DistributedModelParallel(Student(way), device=CPU)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
        batches, steps = batches_of(5), []
        for _ in range(5):
            if pipelined:
                steps.append(pipeline.progress(batches))
                continue
            optimizer.zero_grad()
            loss, output = model(next(batches))
            loss.backward()
            optimizer.step()
            steps.append(output)
        if pipelined:
            assert len(pipeline._pipelined_modules) == 1
        logits.append(steps)
    assert not any(torch.equal(first, second) for first, second in itertools.pairwise(logits[0]))
    assert all(torch.equal(first, second) for first, second in zip(*logits, strict=True))


# ---- The compressor ----


def test_no_gradient_reaches_the_teacher() -> None:
    torch.manual_seed(0)
    teacher, compressor = nn.Linear(5, 16), EmbeddingCompressor(16, 8)
    embeddings = teacher(torch.randn(6, 5))
    (embeddings.sum() + compressor.loss(embeddings) + compressor(embeddings).sum()).backward()
    alone = copy.deepcopy(teacher)
    alone.zero_grad()
    torch.manual_seed(0)
    nn.Linear(5, 16), EmbeddingCompressor(16, 8)  # draws as above
    alone(torch.randn(6, 5)).sum().backward()
    for p, q in zip(teacher.parameters(), alone.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
    assert all(p.grad is not None and p.grad.any() for p in compressor.parameters())


@pytest.mark.parametrize("prefixes", [(), (3, 1)])
def test_the_loss_is_that_of_loops(prefixes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    compressor = EmbeddingCompressor(5, 4, prefixes).double()
    assert compressor.prefixes == (prefixes or (4,))
    embeddings = torch.randn(3, 5, dtype=torch.float64)
    encode, decode = compressor.encoder, compressor.decoder
    total, count = 0.0, 0
    for row in embeddings.tolist():
        weights = zip(encode.weight.tolist(), encode.bias.tolist(), strict=True)
        z = [math.tanh(math.fsum([b, *map(float.__mul__, w, row)])) for w, b in weights]
        for d in compressor.prefixes:
            for e, w, b in zip(row, decode.weight.tolist(), decode.bias.tolist(), strict=True):
                total += (e - math.fsum([b, *map(float.__mul__, w[:d], z[:d])])) ** 2
                count += 1
    # a few numbers below 10 in each, and some 60 squares: 100 roundings and more would be wrong
    assert float(compressor.loss(embeddings).detach()) == pytest.approx(total / count, rel=1e-13)


def test_every_prefix_of_a_trained_code_tells_more_than_the_mean() -> None:
    """For embeddings of rank 4; a code trained at its full width alone can't be cut."""
    torch.manual_seed(0)
    factors = torch.randn(4, 24) * torch.tensor([[2.0], [1.0], [0.5], [0.25]])
    embeddings = 0.3 * torch.randn(256, 4) @ factors + torch.randn(24)
    spread = float((embeddings - embeddings.mean(0)).square().mean())

    def trained(*prefixes: int) -> dict[int, float]:
        torch.manual_seed(1)
        compressor = EmbeddingCompressor(24, 16, prefixes)
        optimizer = torch.optim.Adam(compressor.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            compressor.loss(embeddings).backward()
            optimizer.step()
        errors = {}
        for d in (4, 8, 16):
            compressor.prefixes = (d,)
            errors[d] = float(compressor.loss(embeddings).detach()) / spread
        return errors

    every, full_width = trained(), trained(16)
    assert every[4] < 0.2 and every[8] < 0.2 and every[16] < 0.1  # shares of the variance
    assert full_width[16] < 0.1 and full_width[4] > 2 * every[4] and full_width[8] > 2 * every[8]


def test_default_prefixes_are_halves() -> None:
    for width, prefixes in {1: (1,), 4: (4,), 8: (8, 4), 12: (12, 6), 32: (32, 16, 8, 4)}.items():
        assert EmbeddingCompressor(3, width).prefixes == prefixes
    for wrong in ((0, 4), (9,), (-1,)):
        with pytest.raises(ValueError, match=r"from 1 to 8; received \("):
            EmbeddingCompressor(3, 8, wrong)
    with pytest.raises(ValueError, match="from 1 to 0"):
        EmbeddingCompressor(3, 0)


def test_the_version_is_kept_and_moves_when_told() -> None:
    compressor = EmbeddingCompressor(6, 4)
    compressor.loss(torch.randn(3, 6)).backward()
    assert int(compressor.version) == 0
    assert compressor.refresh() == 1 and compressor.refresh() == 2
    file = io.BytesIO()
    torch.save(compressor.state_dict(), file)
    file.seek(0)
    other = EmbeddingCompressor(6, 4)
    other.load_state_dict(torch.load(file, weights_only=True))
    embeddings = torch.randn(3, 6)
    assert other.version.dtype == torch.int64 and int(other.version) == 2
    assert torch.equal(other(embeddings), compressor(embeddings))
    assert other.bfloat16().version.dtype == torch.int64 and other.refresh() == 3


@pytest.mark.parametrize("autocast", [False, True])
def test_embeddings_of_half_precision(autocast: bool) -> None:
    torch.manual_seed(0)
    compressor, embeddings = EmbeddingCompressor(6, 4), torch.randn(3, 6).bfloat16()
    expected = float(compressor.loss(embeddings.float()).detach())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = compressor.loss(embeddings)
    assert loss.dtype == torch.float32
    # relative to squares of some 1: six products and sums of bfloat16's, in each of two layers
    assert abs(float(loss.detach()) - expected) <= (24 * U[torch.bfloat16] if autocast else 0.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compressor.parameters())


# ---- Drift ----


def test_drift_is_that_of_loops_and_zero_for_the_same() -> None:
    torch.manual_seed(0)
    old, new = torch.randn(20, 3), torch.randn(20, 3)
    rows, others = old.tolist(), new.tolist()
    means = [math.fsum(row[d] for row in rows) / 20 for d in range(3)]
    moved = math.fsum((a - b) ** 2 for x, y in zip(rows, others) for a, b in zip(x, y))  # noqa: B905
    spread = math.fsum((a - m) ** 2 for x in rows for a, m in zip(x, means, strict=True))
    assert embedding_drift(old, new) == pytest.approx(moved / spread, rel=1e-13)
    assert embedding_drift(old, old.clone()) == 0
    assert embedding_drift(old.requires_grad_(), old * 1.1) > 0


def test_unrelated_codes_of_equal_spread_have_drifted_by_two() -> None:
    """Up to chance: of n D = 40,000 numbers the ratio has a deviation below sqrt(16 / n D)."""
    torch.manual_seed(0)
    old, new = torch.rand(5000, 8) * 2 - 1, torch.rand(5000, 8) * 2 - 1
    assert abs(embedding_drift(old, new) - 2) < 5 * math.sqrt(16 / 40_000)
    assert abs(embedding_drift(old, old[torch.randperm(5000)]) - 2) < 5 * math.sqrt(16 / 40_000)


def test_codes_that_tell_no_drift_are_refused() -> None:
    good = torch.arange(6.0).reshape(3, 2)
    for old, new in (
        (good, good[:2]),
        (good[0], good[0]),
        (good[:0], good[:0]),
        (good[:1], good[:1]),
        (torch.ones(3, 2), good),
        (torch.ones(3, 2), torch.ones(3, 2)),
        (good, good * torch.nan),
        (good * torch.inf, good),
    ):
        with pytest.raises(ValueError, match=r"codes should be of one shape \(n, D\), finite"):
            embedding_drift(old, new)
