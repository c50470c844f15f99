"""MLA's formulas and its state; the authors' numbers are in tests/golden.

MLA has no part in an ordinary training step, so that ranks, AMP and compilation are here as well.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from cells import Cell
from ranks import ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from ways import two_ranks_find

import mmfuse

WIDTH, CLASSES, ROWS = 4, 3, 6


def turn(head: nn.Module, mla: mmfuse.MLA, feature: Tensor, labels: Tensor) -> tuple[Any, Tensor]:
    """The result, and the gradient before."""
    head.zero_grad()
    F.cross_entropy(head(feature), labels).backward()
    raw = head.weight.grad.clone()
    return mla.step(feature), raw


def batch(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, WIDTH, dtype=dtype) + 0.5, torch.randint(0, CLASSES, (rows,))


def plain(p: list[list[float]], r: list[float], a: float, elementwise: bool) -> list[list[float]]:
    """The projector after a turn, in Python's numbers."""
    n = range(len(r))
    k = [sum(p[i][j] * r[j] for j in n) for i in n]
    scalar = a + sum(r[i] * k[i] for i in n)
    q = [
        [p[i][j] - k[i] * k[j] / (a + k[i] * r[j] if elementwise else scalar) for j in n] for i in n
    ]
    norm = math.sqrt(sum(x * x for row in q for x in row))
    return [[x / norm for x in row] for row in q]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("batches", [None, 4])
@pytest.mark.parametrize("count", [2, 3])
def test_the_formula(count: int, batches: int | None, official: bool) -> None:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    made = mmfuse.MLA.official if official else mmfuse.MLA
    mla = made(head, num_modalities=count, batches=batches)
    p = torch.eye(WIDTH).tolist()
    for t in range(25):
        feature, labels = batch()
        out, raw = turn(head, mla, feature, labels)
        share = 0 if batches is None else t // count % batches / batches
        a = 0.1 ** (1 + share)
        assert out.alpha.item() == pytest.approx(a)
        if t:
            p = plain(p, feature.mean(0).tolist(), a, official)
        # The elementwise division loses digits where an entry of a + k r is next to nothing.
        tolerance = 1e-6 if official else 1e-10
        want = torch.tensor(p, dtype=torch.float64)
        torch.testing.assert_close(mla.projector, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(head.weight.grad, raw @ want.T, rtol=1e-6, atol=tolerance)
        ratio = head.weight.grad.norm() / raw.norm()
        assert out.kept.item() == pytest.approx(ratio.item(), rel=1e-6) and bool(out.finite)
        assert (ratio < 0.99) == (t > 0)


def test_the_gradient_is_turned_away_from_features_that_the_head_has_seen() -> None:
    head = nn.Linear(WIDTH, CLASSES, bias=False)
    mla = mmfuse.MLA(head)
    seen = torch.tensor([[1.0, 0, 0, 0]]).repeat(ROWS, 1)
    labels = torch.arange(ROWS) % CLASSES
    turn(head, mla, seen, labels)
    turn(head, mla, seen, labels)
    both = torch.tensor([[1.0, 1, 0, 0]]).repeat(ROWS, 1)
    _, raw = turn(head, mla, both, labels)
    now = head.weight.grad.norm(dim=0)
    assert raw[:, 0].equal(raw[:, 1]) and now[0] < 0.2 * now[1]


@pytest.mark.parametrize("what", ["gradient", "features", "no rows"])
def test_what_is_not_finite_changes_nothing(what: str) -> None:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    mla = mmfuse.MLA(head)
    for _ in range(2):
        turn(head, mla, *batch())
    before = copy.deepcopy(mla.state_dict())
    feature, _ = batch()
    if what == "gradient":
        head.weight.grad[0, 0] = torch.inf
    elif what == "features":
        feature[0, 0] = torch.nan
    raw = head.weight.grad.clone()
    out = mla.step(feature[: 0 if what == "no rows" else ROWS])
    assert not out.finite
    assert head.weight.grad.equal(raw)
    assert all(torch.equal(x, before[name]) for name, x in mla.state_dict().items())


def test_in_eval_and_outside_of_its_epochs_nothing_changes() -> None:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    mla = mmfuse.MLA(head, starts=1, ends=1)
    for epoch in range(3):
        mla.set_epoch(epoch)
        for training in (False, True):
            mla.train(training)
            for _ in range(2):
                before = mla.projector.clone()
                out, raw = turn(head, mla, *batch())
            acts = epoch == 1 and training
            assert raw.equal(head.weight.grad) == before.equal(mla.projector) == (not acts)
            assert (out.kept != 1) == acts


def test_features_of_positions_count_one_by_one() -> None:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    flat, labels = batch(12)
    made = []
    for shape in ((12, WIDTH), (3, 4, WIDTH)):
        mla = mmfuse.MLA(head)
        for _ in range(2):
            head.zero_grad()
            F.cross_entropy(head(flat), labels).backward()
            mla.step(flat.view(shape))
        made.append(mla.projector)
    torch.testing.assert_close(*made, rtol=1e-14, atol=1e-14)


class Model(nn.Module):
    """Two encoders, their head, and MLA on it."""

    def __init__(self, seed: int = 0, mla: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoders = nn.ModuleDict({n: nn.Linear(3, WIDTH) for n in ("audio", "visual")})
        self.head = nn.Linear(WIDTH, CLASSES)
        self.mla = mmfuse.MLA(self.head, batches=2) if mla else None

    def forward(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.encoders[name](x)
        return feature, self.head(feature)


def train(model: Model, first: int, end: int, scaler: Any = None, wrapped: Any = None) -> None:
    """SGD with momentum; a batch is that of its number."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(first, end):
        generator = torch.Generator().manual_seed(t)
        labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        for name in model.encoders:
            x = torch.randn(ROWS, 3, generator=generator)
            optimizer.zero_grad()
            feature, z = (wrapped or model)(name, x)
            F.cross_entropy(z, labels).backward()
            model.mla.step(feature)
            optimizer.step()


def test_the_model_saves_the_projector_and_the_head_once() -> None:
    model = Model()
    added = set(model.state_dict()) - set(Model(mla=False).state_dict())
    assert added == {"mla.projector", "mla.turns", "mla.epoch_state"}
    assert "mla" not in "".join(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("how", ["torch", "safetensors", "pickle", "deepcopy"])
def test_a_run_goes_on(how: str, tmp_path: Any) -> None:
    straight = Model()
    train(straight, 0, 5)
    other = Model(seed=1)
    if how == "torch":
        file = io.BytesIO()
        torch.save(straight.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    elif how == "safetensors":
        files = pytest.importorskip("safetensors.torch")
        files.save_file(straight.state_dict(), tmp_path / "m")
        other.load_state_dict(files.load_file(tmp_path / "m"))
    else:
        other = (
            copy.deepcopy(straight) if how == "deepcopy" else pickle.loads(pickle.dumps(straight))
        )
    assert other.mla._head is other.head
    for model in (straight, other):
        train(model, 5, 8)
    assert int(other.mla.turns) == 16
    for name, x in straight.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name


def test_it_is_the_state_that_makes_the_difference() -> None:
    straight = Model()
    train(straight, 0, 5)
    other = copy.deepcopy(straight)
    other.mla.reset_parameters()
    assert other.mla.projector.equal(torch.eye(WIDTH)) and int(other.mla.turns) == 0
    for model in (straight, other):
        train(model, 5, 6)
    assert not straight.head.weight.equal(other.head.weight)


def test_a_model_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    model.mla.reset_parameters()
    assert model.mla.projector.equal(torch.eye(WIDTH))
    train(model, 0, 2)
    assert bool(model.mla.projector.isfinite().all())


def test_a_step_that_a_grad_scaler_skips_leaves_the_state_alone() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for t in range(4):
        before, weight = copy.deepcopy(model.mla.state_dict()), model.head.weight.clone()
        optimizer.zero_grad()
        feature, z = model("audio", torch.randn(ROWS, 3))
        loss = F.cross_entropy(z, torch.randint(0, CLASSES, (ROWS,)))
        scaler.scale(loss * (math.inf if t == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        model.mla.step(feature)
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(x, before[n]) for n, x in model.mla.state_dict().items())
        assert same == model.head.weight.equal(weight) == (t == 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_projector_is_float32_at_least(dtype: torch.dtype) -> None:
    head = nn.Linear(WIDTH, CLASSES, dtype=dtype)
    mla = mmfuse.MLA(head)
    for _ in range(2):
        _, raw = turn(head, mla, *batch(dtype=dtype))
    assert mla.projector.dtype == torch.float32 and head.weight.grad.dtype == dtype
    want = (raw.float() @ mla.projector.T).to(dtype)
    assert head.weight.grad.equal(want)


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_step_is_one_graph(masked: bool) -> None:
    """Masks are among the cases, even one in which nobody has the modality."""
    heads = [nn.Linear(WIDTH, CLASSES, dtype=torch.float64) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    made = [mmfuse.MLA(head, batches=3) for head in heads]
    graphs = []

    def kept(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    steps = [made[0].step, torch.compile(made[1].step, fullgraph=True, backend=kept)]
    for i in range(5):
        feature, labels = batch()
        here = torch.arange(len(feature)) < (0 if i == 2 else len(feature) - 1)
        for head, step in zip(heads, steps, strict=True):
            head.zero_grad()
            F.cross_entropy(head(feature), labels).backward()
            step(feature, **({"present": here} if masked else {}))
        torch.testing.assert_close(heads[0].weight.grad, heads[1].weight.grad)
    torch.testing.assert_close(made[0].projector, made[1].projector)
    assert len(graphs) == 1


def on_rank(rank: int, sharing: str) -> list[Tensor]:
    """The whole batch of four turns, of which each rank has a part of another size."""
    torch.manual_seed(0)
    mine = slice(0, 2) if rank == 0 else slice(2, ROWS)
    head: Any = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    if sharing == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(head)
    mla = mmfuse.MLA(head)
    for _ in range(4):
        feature, labels = batch()
        head.zero_grad()
        # Each rank's share of the mean over all samples, which DDP and FSDP2 average.
        scale = 2 * len(feature[mine]) / ROWS
        called = DistributedDataParallel(head) if sharing == "ddp" else head
        (scale * F.cross_entropy(called(feature[mine]), labels[mine])).backward()
        mla.step(feature[mine])
    grad = head.weight.grad
    return [mla.projector, grad.full_tensor() if sharing == "fsdp" else grad]


@pytest.mark.parametrize("sharing", ["ddp", "fsdp"])
def test_ranks_project_as_one_process(sharing: str) -> None:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    mla = mmfuse.MLA(head)
    for _ in range(4):
        turn(head, mla, *batch())
    for found in ranks(2).run(on_rank, sharing):
        torch.testing.assert_close(found, [mla.projector, head.weight.grad], rtol=1e-11, atol=1e-12)


def wrong_on_one(rank: int) -> str:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    mla = mmfuse.MLA(head)
    turn(head, mla, *batch())
    feature, labels = batch()
    F.cross_entropy(head(feature), labels).backward()
    before = mla.projector.clone()
    try:
        mla.step(feature[:, : WIDTH - rank])
    except (RuntimeError, ValueError) as error:
        assert mla.projector.equal(before)
        return type(error).__name__
    return "none"


def test_an_error_on_one_rank_stops_all() -> None:
    assert ranks(2).run(wrong_on_one) == ["RuntimeError", "ValueError"]


HEADS: dict[str, tuple[Any, type[Exception], str]] = {
    "sequential": (lambda: nn.Sequential(nn.Linear(2, 2)), TypeError, r"give the layer itself"),
    "convolution": (lambda: nn.Conv2d(1, 1, 1), TypeError, r"head must be a linear layer"),
    "lazy": (lambda: nn.LazyLinear(2), ValueError, "head has not been used yet"),
}


@pytest.mark.parametrize("name", HEADS)
def test_wrong_heads_are_named(name: str) -> None:
    made, error, message = HEADS[name]
    with pytest.raises(error, match=message):
        mmfuse.MLA(made())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alpha", 0.0),
        ("alpha", math.inf),
        ("batches", 0),
        ("num_modalities", 1),
        ("ends", -1),
    ],
)
def test_bad_options(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        mmfuse.MLA(nn.Linear(2, 2), **{option: value})


FEATURES: dict[str, tuple[Any, type[Exception], str]] = {
    "width": (torch.ones(2, 3), ValueError, r"features must be \[B, 4\], got \[2, 3\]"),
    "rows": (torch.ones(4), ValueError, r"features must be \[B, 4\], got \[4\]"),
    "sparse": (torch.ones(2, 4).to_sparse(), TypeError, "it has layout torch.sparse_coo"),
    "dtype": (torch.ones(2, 4).long(), TypeError, "features must be a floating tensor"),
    "list": ([1.0] * 4, TypeError, "features must be a floating tensor .* not a tensor but list"),
    "device": (torch.ones(2, 4, device="meta"), ValueError, "features are on meta"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_wrong_features_are_named_before_anything_changes(name: str) -> None:
    features, error, message = FEATURES[name]
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    mla = mmfuse.MLA(head)
    for _ in range(2):
        turn(head, mla, *batch())
    before = copy.deepcopy([*mla.state_dict().values(), head.weight.grad])
    with pytest.raises(error, match=message):
        mla.step(features)
    assert all(map(torch.equal, [*mla.state_dict().values(), head.weight.grad], before))


def test_a_step_without_a_gradient_says_when_to_call_it() -> None:
    head = nn.Linear(WIDTH, CLASSES)
    with pytest.raises(RuntimeError, match="no gradient: call step after the backward pass"):
        mmfuse.MLA(head).step(torch.ones(2, WIDTH))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_fusion(cell: Cell, count: int) -> None:
    torch.manual_seed(0)
    logits = {f"m{i}": 3 * torch.randn(5, 4, device=cell.device) for i in range(count)}
    mla = mmfuse.MLA(nn.Linear(2, 4), backend=cell.backend)
    out = mla.fuse(logits)
    for i in range(5):
        entropy = []
        for z in logits.values():
            shares = [math.exp(x) for x in z[i].double().log_softmax(0).tolist()]
            entropy.append(-sum(p * math.log(p) for p in shares))
        total = sum(math.exp(-h) for h in entropy)
        want = [math.exp(-h) / total for h in entropy]
        assert out.weights[:, i].tolist() == pytest.approx(want, rel=1e-4)
        fused = sum(w * z[i].double() for w, z in zip(want, logits.values(), strict=True))
        torch.testing.assert_close(out.logits[i].double(), fused, rtol=1e-4, atol=1e-4)


def test_a_missing_modality_weighs_nothing_whatever_it_holds() -> None:
    logits = {"a": torch.randn(3, 4), "b": torch.randn(3, 4), "c": torch.randn(3, 4)}
    mla = mmfuse.MLA(nn.Linear(2, 4))
    want = mla.fuse({"a": logits["a"], "b": logits["b"]})
    logits["c"][1] = torch.nan
    present = {n: torch.tensor([True] * 3) for n in logits}
    present["c"][1] = present["a"][2] = present["b"][2] = False
    out = mla.fuse(logits, present=present)
    torch.testing.assert_close(out.logits[1], want.logits[1])
    assert out.weights[2, 1] == 0 and out.logits[2].equal(logits["c"][2])


def test_a_probability_of_zero_is_of_a_sure_modality_but_in_the_release() -> None:
    sure = torch.tensor([[0.0, 1000.0]])
    logits = {"a": sure, "b": torch.zeros(1, 2)}
    out = mmfuse.MLA(nn.Linear(2, 2)).fuse(logits)
    assert out.weights[:, 0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert bool(mmfuse.MLA.official(nn.Linear(2, 2)).fuse(logits).weights.isnan().all())


FUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([torch.ones(2, 3)] * 2, TypeError, "logits must map names to tensors, got list"),
    "one": ({"a": torch.ones(2, 3)}, ValueError, "at least two modalities"),
    "shape": (
        {"a": torch.ones(2, 3), "b": torch.ones(2, 4)},
        ValueError,
        r"logits\['b'\] must be .* like logits\['a'\] \[2, 3\], got \[2, 4\]",
    ),
    "dtype": (
        {"a": torch.ones(2, 3), "b": torch.ones(2, 3).long()},
        TypeError,
        r"logits\['b'\] must be a floating-point tensor",
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_wrong_logits_are_named(name: str) -> None:
    logits, error, message = FUSED[name]
    with pytest.raises(error, match=message):
        mmfuse.MLA(nn.Linear(2, 2)).fuse(logits)


def test_releases_differ_by_whether_they_project() -> None:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    for release in ("first", "head"):
        mla = mmfuse.MLA.official(head, release=release)
        for _ in range(2):
            _, raw = turn(head, mla, *batch())
        assert head.weight.grad.equal(raw) == (release == "head")


def masked_turns(rank: int, size: int) -> list[Tensor]:
    """P and the gradients of turns in which samples lack modalities; the second rank has no "b"."""
    torch.manual_seed(2)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    mla, found = mmfuse.MLA(head, batches=3), []
    mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
    for step in range(3):
        for name in ("a", "b"):
            generator = torch.Generator().manual_seed(step)
            feature = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64)
            here = torch.rand(8, generator=generator) > 0.3
            if name == "b":
                here[(0 if step == 1 else 4) :] = False
            feature[~here] = torch.nan
            head.weight.grad = torch.randn(CLASSES, WIDTH, generator=generator).double()
            out = mla.step(feature[mine], present=here[mine])
            assert bool(out.finite)
            found += [mla.projector.clone(), head.weight.grad.clone(), out.kept, out.alpha]
    return found


def test_a_turn_is_of_the_samples_that_have_the_modality() -> None:
    """It acts on their rows alone; a turn of nobody counts in the epoch and changes nothing."""
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    masked, rows_only = (mmfuse.MLA(head, batches=3) for _ in range(2))
    for _ in range(3):
        feature, here = torch.randn(6, WIDTH, dtype=torch.float64), torch.rand(6) > 0.3
        here[0] = True
        raw = torch.randn(CLASSES, WIDTH, dtype=torch.float64)
        grads = []
        for mla, given in ((masked, {"present": here}), (rows_only, {})):
            head.weight.grad = raw.clone()
            shown = feature.clone()
            shown[~here] = torch.nan
            mla.step(shown if given else feature[here], **given)
            grads.append(head.weight.grad.clone())
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(masked.projector, rows_only.projector)
    before, turns = masked.projector.clone(), int(masked.turns)
    head.weight.grad = raw.clone()
    nobody = torch.zeros(6, dtype=torch.bool)
    out = masked.step(torch.full((6, WIDTH), torch.nan).double(), present=nobody)
    assert out.kept == 1 and bool(out.finite) and torch.equal(head.weight.grad, raw)
    assert torch.equal(masked.projector, before) and int(masked.turns) == turns + 1
    head.weight.grad = None
    assert bool(masked.step(feature, present=nobody).finite) and head.weight.grad is None
    with pytest.raises(RuntimeError, match="the head's weight has no gradient"):
        masked.step(feature, present=~nobody)


def test_places_of_a_sample_that_is_missing_are_missing() -> None:
    head = nn.Linear(WIDTH, CLASSES)
    one, other = (mmfuse.MLA(head) for _ in range(2))
    feature, here = torch.randn(4, 3, WIDTH), torch.tensor([True, False, True, False])
    for mla, given in ((one, {"present": here}), (other, {})):
        head.weight.grad = torch.ones_like(head.weight)
        mla.step(feature if given else feature[here], **given)
    torch.testing.assert_close(one.projector, other.projector)


def test_ranks_of_which_one_lacks_the_modality_are_one_batch() -> None:
    two_ranks_find(masked_turns)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.ones(4), TypeError, r"present must be a bool tensor \[B\], got torch.float32"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"present must have shape \[4\], got \[3\]"),
    ],
)
def test_a_wrong_mask_changes_nothing(mask: Any, error: type[Exception], text: str) -> None:
    head = nn.Linear(WIDTH, CLASSES)
    head.weight.grad, mla = torch.ones_like(head.weight), mmfuse.MLA(head)
    with pytest.raises(error, match=text):
        mla.step(torch.randn(4, WIDTH), present=mask)
    assert int(mla.turns) == 0 and bool((head.weight.grad == 1).all())


def test_each_place_has_its_own_weights() -> None:
    logits = {n: torch.randn(3, 4, 2, 5) for n in ("a", "b")}
    mla = mmfuse.MLA(nn.Linear(2, 4))
    out = mla.fuse(logits)
    assert out.weights.shape == (2, 3, 2, 5)
    flat = {n: z.movedim(1, -1).reshape(-1, 4) for n, z in logits.items()}
    want = mla.fuse(flat)
    torch.testing.assert_close(out.logits, want.logits.view(3, 2, 5, 4).movedim(-1, 1))
    torch.testing.assert_close(out.weights.flatten(1), want.weights)
    here = {"a": torch.tensor([True, False, False]), "b": torch.tensor([True, True, False])}
    shown = mla.fuse(logits, present=here)
    torch.testing.assert_close(shown.logits[0], out.logits[0])
    torch.testing.assert_close(shown.logits[1], logits["b"][1])
    assert not shown.logits[2].any() and not shown.weights[:, 2].any()


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4), (3, 2, 2)])
def test_several_labels_are_weighed_by_all_of_their_entropies(shape: tuple[int, ...]) -> None:
    logits = {n: (m + 1) * torch.randn(shape) for m, n in enumerate(("a", "b"))}
    out = mmfuse.MLA(nn.Linear(2, 4)).fuse(logits, criterion=nn.BCEWithLogitsLoss())
    entropies = []
    for z in logits.values():
        p = z.reshape(3, -1).sigmoid()
        entropies.append(-(p * p.log() + (1 - p) * (1 - p).log()).sum(1))
    want = (-torch.stack(entropies)).softmax(0)
    torch.testing.assert_close(out.weights, want, rtol=1e-4, atol=1e-5)
    each = zip(want, logits.values(), strict=True)
    mixed = sum(w.view(3, *[1] * (z.dim() - 1)) * z for w, z in each)
    torch.testing.assert_close(out.logits, mixed, rtol=1e-4, atol=1e-5)
