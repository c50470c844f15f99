"""ReLearning: purities, weights and resets from their definitions, and odd inputs."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cells import Cell
from ranks import ranks
from states import differences
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from ways import two_ranks_find

import mmfuse
from mmfuse.methods._relearning_purity import purity, scaled

NAMES = ("audio", "visual", "text")
STEPS = 25


class Encoder(nn.Module):
    """Weights, batch norm with its buffers, and a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(width, 6), nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


def encoders_of(count: int, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({name: Encoder(3 + m) for m, name in enumerate(NAMES[:count])})


@torch.no_grad()
def wander(module: nn.Module, seed: int) -> None:
    """Changes parameters and buffers, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator).to(p))
    for b in module.buffers():
        if b.is_floating_point():
            b.add_(torch.rand(b.shape, generator=generator).to(b))


def samples(
    count: int, rows: int, seed: int, apart: float = 2.0
) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    features = {
        name: torch.randn(rows, 4, generator=generator) + apart * (m + 1) * labels.unsqueeze(1)
        for m, name in enumerate(NAMES[:count])
    }
    return features, labels


def nearest(x: Tensor) -> Tensor:
    """Clusters by the mean of a row: a stand-in for k-means that gives the same everywhere."""
    return ((x.mean(1) + 1) * 1.5).long().clamp(0, 2)


def transcribed_purity(labels: list[int], clusters: list[int]) -> float:
    right = 0
    for c in set(clusters):
        mine = [y for y, k in zip(labels, clusters, strict=True) if k == c]
        right += max(mine.count(y) for y in mine)
    return right / len(labels)


class TestWeights:
    @pytest.mark.parametrize("count", [2, 3])
    def test_the_papers_equations(self, count: int) -> None:
        relearning = mmfuse.ReLearning(encoders_of(count), lam=2.0)
        different, signs = set(), set()
        for step in range(STEPS):
            # In turns one of them has the purer clusters: the sign of the gap does not count.
            train = samples(count, 30, step, 2.0 if step % 2 else 0.5)
            val = samples(count, 21, 100 + step, 0.5 if step % 2 else 2.0)
            out = relearning.weights(*train, *val, cluster=nearest)
            for s, (features, labels) in enumerate((train, val)):
                for m, x in enumerate(features.values()):
                    low, high = x.min(0).values, x.max(0).values
                    clusters = nearest(2 * (x - low) / (high - low) - 1)
                    expected = transcribed_purity(labels.tolist(), clusters.tolist())
                    assert float(out.purities[s, m]) == pytest.approx(expected, abs=1e-15)
            for m in range(count):
                gap = abs(float(out.purities[0, m]) - float(out.purities[1, m]))
                assert float(out.coefficients[m]) == pytest.approx(math.tanh(2 * gap), abs=1e-15)
            different |= {round(float(k), 6) for k in out.coefficients}
            signs |= set((out.purities[0] > out.purities[1]).tolist())
        assert len(different) > 10 and signs == {True, False}

    def test_columns_from_minus_one_to_one(self) -> None:
        x = torch.tensor([[1.0, 5.0, -2.0], [3.0, 5.0, 0.0], [2.0, 5.0, 2.0]])
        assert scaled(x).tolist() == [[-1, -1, -1], [1, -1, 0], [0, -1, 1]]

    @pytest.mark.parametrize(
        ("labels", "clusters", "expected"),
        [
            ([0, 1, 2], [0, 0, 0], 1 / 3),  # a collapsed encoder
            ([0, 0, 1, 1], [0, 1, 0, 1], 0.5),  # ties
            ([0, 0, 1, 1], [5, 5, 2, 2], 1.0),  # clusters of any numbers
            ([0, 7, 7], [0, 1, 1], 1.0),  # classes without samples
        ],
    )
    def test_purity(self, labels: list[int], clusters: list[int], expected: float) -> None:
        assert purity(torch.tensor(labels), torch.tensor(clusters)) == expected
        assert transcribed_purity(labels, clusters) == expected

    def test_scikit_learns_k_means(self) -> None:
        pytest.importorskip("sklearn")
        relearning = mmfuse.ReLearning(encoders_of(2))
        apart, mixed = samples(2, 60, 0, apart=20.0), samples(2, 60, 1, apart=0.0)
        out = relearning.weights(*apart, *mixed)
        assert out.purities[0].tolist() == [1, 1]
        assert (out.purities[1] < 0.7).all() and (out.coefficients > 0.5).all()
        again = relearning.weights(*apart, *mixed)
        assert torch.equal(out.coefficients, again.coefficients)

    def test_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
        relearning = mmfuse.ReLearning(encoders_of(2))
        with pytest.raises(ImportError, match="pip install scikit-learn, or give cluster="):
            relearning.weights(*samples(2, 9, 0), *samples(2, 9, 1))

    def test_bad_input(self) -> None:
        relearning = mmfuse.ReLearning(encoders_of(2))
        x, y = samples(2, 9, 0)
        for arguments, error, text in [
            (
                ({"audio": x["audio"]}, y, x, y),
                ValueError,
                r"train_features .* missing \['visual'\]",
            ),
            ((x, y, x, y[:3]), ValueError, r"val_features\['audio'\] must be \[3, …\]"),
            ((x, y.float(), x, y), TypeError, "train_labels must be an integer tensor"),
            ((x, y, x, y - 1), ValueError, "val_labels must be at least 0, got -1"),
            ((x, y[:0], x, y), ValueError, "train_labels must be .N. of N > 0"),
            (
                ({**x, "audio": 3}, y, x, y),
                TypeError,
                r"train_features\['audio'\] must be a floating",
            ),
            ((x, y, {**x, "visual": x["visual"] / 0}, y), ValueError, "NaN or an Inf"),
        ]:
            with pytest.raises(error, match=text):
                relearning.weights(*arguments, cluster=nearest)
        with pytest.raises(ValueError, match=r"cluster must give 9 integers, got torch.float32"):
            relearning.weights(x, y, x, y, cluster=lambda x: x.mean(1))


class TestReset:
    @pytest.mark.parametrize("count", [2, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_way_back(self, cell: Cell, count: int, dtype: torch.dtype) -> None:
        cell.skip_slow(count > 2 or dtype == torch.bfloat16)
        encoders = encoders_of(count).to(cell.device, dtype)
        relearning = mmfuse.ReLearning(encoders, backend=cell.backend)
        start = [p.detach().double() for p in encoders.parameters()]
        wander(encoders, 1)
        before = [p.detach().double() for p in encoders.parameters()]
        buffers = copy.deepcopy(dict(encoders.named_buffers()))
        alpha = [0.25, 0.0, 1.0][:count]
        relearning.reset(torch.tensor(alpha))
        owner = [m for m, e in enumerate(encoders.values()) for _ in e.parameters()]
        for m, p, w0, w in zip(owner, encoders.parameters(), start, before, strict=True):
            wanted = alpha[m] * w0 + (1 - alpha[m]) * w
            # Two products and a sum, in the dtype; kernels compute half precision in float32.
            error = (p.detach().double() - wanted).abs()
            size = (alpha[m] * w0).abs() + ((1 - alpha[m]) * w).abs()
            assert (error <= 3 * UNIT_ROUNDOFF[dtype] * size).all()
            if alpha[m] == 0:
                assert torch.equal(p.detach().double(), w)
        assert differences(dict(encoders.named_buffers()), buffers) == []

    def test_a_gradient_and_a_momentum_stay(self) -> None:
        encoders = encoders_of(2)
        relearning = mmfuse.ReLearning(encoders)
        optimizer = torch.optim.SGD(encoders.parameters(), lr=0.1, momentum=0.9)
        sum(net(torch.randn(5, 3 + m)).sum() for m, net in enumerate(encoders.values())).backward()
        optimizer.step()
        grads = [p.grad.clone() for p in encoders.parameters()]
        momentum = copy.deepcopy(optimizer.state_dict()["state"])
        relearning.reset({"visual": 0.5, "audio": torch.tensor(0.5)})
        assert differences([p.grad for p in encoders.parameters()], grads) == []
        assert differences(optimizer.state_dict()["state"], momentum) == []

    def test_autograd_notices(self) -> None:
        encoders = encoders_of(2)
        relearning = mmfuse.ReLearning(encoders)
        out = encoders["audio"].second(torch.randn(2, 6, requires_grad=True))
        relearning.reset(torch.tensor([0.5, 0.5]))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_frozen_and_shared_parameters_stay(self) -> None:
        encoders = encoders_of(2)
        frozen, shared = encoders["audio"].first, encoders["visual"].norm
        frozen.requires_grad_(False)
        relearning = mmfuse.ReLearning(encoders, shared=[shared])
        start = frozen.weight.detach().clone()
        wander(encoders, 1)
        kept = copy.deepcopy(dict(shared.state_dict()))
        assert torch.equal(frozen.weight, start)
        relearning.reset(torch.tensor([0.3, 0.3]))
        assert torch.equal(frozen.weight, start)
        assert differences(dict(shared.state_dict()), kept) == []
        # Unfrozen in between, it goes back to what it was when it was frozen.
        frozen.requires_grad_(True)
        wander(encoders, 2)
        relearning.reset(torch.tensor([1.0, 0.0]))
        assert torch.equal(frozen.weight, start)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_anchors_elsewhere_and_in_another_dtype(self, dtype: torch.dtype | None) -> None:
        encoders = encoders_of(2)
        relearning = mmfuse.ReLearning(encoders, anchor_dtype=dtype, anchor_device="cpu")
        start = [p.detach().clone() for p in encoders.parameters()]
        wander(encoders, 1)
        relearning.reset(torch.ones(2))
        for p, w0 in zip(encoders.parameters(), start, strict=True):
            assert torch.equal(p, w0 if dtype is None else w0.to(dtype).float())

    @pytest.mark.parametrize(
        ("weights", "error", "text"),
        [
            (
                [0.1, 0.2],
                TypeError,
                "must be a dense tensor or map names to numbers, got list",
            ),
            (torch.zeros(3), ValueError, r"weights must have shape \[2\], got \[3\]"),
            (torch.tensor([0.5, 1.5]), ValueError, r"weights\['visual'\] must be in \[0, 1\]"),
            (torch.tensor([math.nan, 0.5]), ValueError, r"weights\['audio'\] must be in \[0, 1\]"),
            ({"audio": 0.1}, ValueError, r"missing \['visual'\]"),
        ],
    )
    def test_bad_weights_change_nothing(
        self, weights: Any, error: type[Exception], text: str
    ) -> None:
        encoders = encoders_of(2)
        relearning = mmfuse.ReLearning(encoders)
        wander(encoders, 1)
        before = copy.deepcopy(dict(encoders.state_dict()))
        with pytest.raises(error, match=text):
            relearning.reset(weights)
        assert differences(dict(encoders.state_dict()), before) == []

    def test_replaced_parameters_are_refused(self) -> None:
        encoders = encoders_of(2)
        relearning = mmfuse.ReLearning(encoders)
        encoders["audio"].second = nn.Linear(6, 4)
        with pytest.raises(ValueError, match="is new since this object was made"):
            relearning.reset(torch.zeros(2))


def test_when() -> None:
    relearning = mmfuse.ReLearning(encoders_of(2))
    assert [e for e in range(100) if relearning.due(e)] == [20, 40, 60]
    other = mmfuse.ReLearning.official(encoders_of(2), every=3, times=5, starts=6, ends=10)
    assert [e for e in range(100) if other.due(e)] == [6, 9]
    other.set_epoch(6)
    assert other.due()
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        other.due(-1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lam": -1.0}, "lam must be a finite number of at least 0"),
        ({"every": 0}, "every must be at least 1"),
        ({"times": -1}, "times must be at least 0"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mmfuse.ReLearning(encoders_of(2), **options)


class TestState:
    def test_a_resumed_run_goes_back_to_its_own_start(self, tmp_path: Path) -> None:
        encoders, others = encoders_of(2), encoders_of(2, seed=1)
        relearning, resumed = mmfuse.ReLearning(encoders), mmfuse.ReLearning(others)
        wander(encoders, 1)
        torch.save([encoders.state_dict(), relearning.state_dict()], tmp_path / "saved")
        loaded = torch.load(tmp_path / "saved", weights_only=True)
        others.load_state_dict(loaded[0])
        resumed.load_state_dict(loaded[1])
        for each in (relearning, resumed):
            each.reset(torch.tensor([0.4, 0.9]))
        assert differences(dict(others.state_dict()), dict(encoders.state_dict())) == []

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_goes_on_with_the_copied_encoders(self, how: Any) -> None:
        encoders = encoders_of(2)
        relearning = mmfuse.ReLearning(encoders)
        wander(encoders, 1)
        others, copied = how((encoders, relearning))
        for each in (relearning, copied):
            each.reset(torch.tensor([0.4, 0.9]))
        assert differences(dict(others.state_dict()), dict(encoders.state_dict())) == []

    def test_a_state_that_does_not_fit(self) -> None:
        relearning = mmfuse.ReLearning(encoders_of(2))
        with pytest.raises(ValueError, match="has no format number"):
            relearning.load_state_dict({})
        state = mmfuse.ReLearning(encoders_of(3)).state_dict()
        with pytest.raises(
            ValueError, match=r"is of encoders=\['audio', 'visual', 'text'\], in this"
        ):
            relearning.load_state_dict(state)
        del state["modalities"]  # as mmfuse saved it before
        with pytest.raises(ValueError, match="the state holds 18 anchors"):
            relearning.load_state_dict(state)

    def test_encoders_in_another_order(self) -> None:
        encoders = encoders_of(2)
        relearning, turned = (
            mmfuse.ReLearning(dict(each)) for each in (encoders.items(), reversed(encoders.items()))
        )
        state, before = relearning.state_dict(), copy.deepcopy(turned.state_dict())
        with pytest.raises(ValueError, match=r"'visual'\], in this order, .*=\['visual', 'audio'"):
            turned.load_state_dict(state)
        assert differences(turned.state_dict(), before) == []
        del state["modalities"]
        relearning.load_state_dict(state)


def masked_samples(
    count: int, rows: int, seed: int, apart: float = 2.0
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """Samples of which the second half has no audio; what is missing is NaN."""
    features, labels = samples(count, rows, seed, apart)
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(rows, generator=generator) > 0.3 for name in features}
    masks["audio"][rows // 2 :] = False
    for name, x in features.items():
        x[~masks[name]] = math.nan
    return features, labels, masks


class TestMissing:
    @pytest.mark.parametrize("count", [2, 3])
    def test_a_purity_is_of_the_samples_that_have_the_modality(self, count: int) -> None:
        relearning = mmfuse.ReLearning(encoders_of(count))
        (x, y, here), (v, w, there) = masked_samples(count, 30, 0), masked_samples(count, 21, 1)
        out = relearning.weights(x, y, v, w, train_present=here, val_present=there, cluster=nearest)
        for m, name in enumerate(x):
            for s, (features, labels, mask) in enumerate(((x, y, here), (v, w, there))):
                clusters = nearest(scaled(features[name][mask[name]]))
                want = transcribed_purity(labels[mask[name]].tolist(), clusters.tolist())
                assert float(out.purities[s, m]) == pytest.approx(want, abs=1e-15)
        gap = (out.purities[0] - out.purities[1]).abs()
        torch.testing.assert_close(out.coefficients, torch.tanh(3 * gap))
        assert out.coefficients.any()

    def test_a_modality_without_samples_stays_where_it_is(self) -> None:
        encoders = encoders_of(2)
        relearning = mmfuse.ReLearning(encoders)
        x, y, here = masked_samples(2, 30, 0)
        v, w = samples(2, 21, 1, 0.0)
        here["audio"][:] = False
        out = relearning.weights(x, y, v, w, train_present=here, cluster=nearest)
        assert out.purities[0].isnan().tolist() == [True, False]
        assert out.coefficients[0] == 0 and out.coefficients[1] > 0
        wander(encoders, 1)
        before = copy.deepcopy(dict(encoders["audio"].state_dict()))
        relearning.reset(out.coefficients)
        assert differences(dict(encoders["audio"].state_dict()), before) == []

    def test_k_means_of_fewer_samples_than_classes(self) -> None:
        pytest.importorskip("sklearn")
        relearning = mmfuse.ReLearning(encoders_of(2))
        x, y, here = masked_samples(2, 30, 0)
        here["audio"][2:] = False
        here["audio"][:2] = True
        x["audio"][:2] = torch.randn(2, 4)
        v, w = samples(2, 21, 1)
        out = relearning.weights(x, y, v, w, train_present=here)
        assert out.purities[0, 0] == 1 and out.purities.isfinite().all()

    def test_what_is_not_finite_is_an_error_where_it_is_not_said_to_be_missing(self) -> None:
        relearning = mmfuse.ReLearning(encoders_of(2))
        x, y, here = masked_samples(2, 30, 0)
        v, w = samples(2, 21, 1)
        with pytest.raises(ValueError, match=r"holds a NaN or an Inf; train_present says which"):
            relearning.weights(x, y, v, w, cluster=nearest)
        wrong = {**here, "visual": torch.ones(30)}
        with pytest.raises(TypeError, match=r"val_present\['visual'\] must be a bool tensor"):
            relearning.weights(v, w, x, y, val_present=wrong, cluster=nearest)


def masked_weights(rank: int, size: int) -> list[Tensor]:
    """All of one modality's samples are the first rank's."""
    relearning = mmfuse.ReLearning(encoders_of(3))
    mine, given, told = slice(rank * 15 // size, (rank + 1) * 15 // size), [], []
    for seed in (0, 1):
        x, y, here = masked_samples(3, 15, seed, 2.0 - 2 * seed)
        here["audio"][7:] = False
        given += [{n: z[mine] for n, z in x.items()}, y[mine]]
        told.append({n: z[mine] for n, z in here.items()})
    out = relearning.weights(*given, train_present=told[0], val_present=told[1], cluster=nearest)
    return [out.coefficients, out.purities]


def weights_and_reset(rank: int, size: int) -> dict[str, Any]:
    encoders = encoders_of(2)
    relearning = mmfuse.ReLearning(encoders)
    wander(encoders, 1)
    train, val = samples(2, 30, 0), samples(2, 20, 1, 0.5)
    mine = slice(None) if size == 1 else (slice(0, 13), slice(13, None))[rank]
    given = [({n: x[mine] for n, x in f.items()}, y[mine]) for f, y in (train, val)]
    out = relearning.weights(*given[0], *given[1], cluster=nearest)
    relearning.reset(out.coefficients)
    return {"purities": out.purities, "parameters": [p.detach() for p in encoders.parameters()]}


def fails_on_one(rank: int) -> str:
    relearning = mmfuse.ReLearning(encoders_of(2))
    x, y = samples(2, 9, rank)

    def cluster(features: Tensor) -> Tensor:
        raise OSError("no clusters today")

    texts = []
    for labels, how in ((y - rank, nearest), (y, cluster)):
        with pytest.raises((ValueError, RuntimeError, OSError)) as caught:
            relearning.weights(x, labels, x, y, cluster=how)
        texts.append(f"{type(caught.value).__name__}: {caught.value}")
    relearning.weights(x, y, x, y, cluster=nearest)
    return "; ".join(texts)


class TestRanks:
    def test_samples_of_all_are_clustered_together(self) -> None:
        expected = weights_and_reset(0, 1)
        for found in ranks(2).run(weights_and_reset, 2):
            assert differences(found, expected) == []
        assert (expected["purities"][0] != expected["purities"][1]).any()

    def test_ranks_that_lack_a_modality_are_one_process(self) -> None:
        whole = two_ranks_find(masked_weights)
        assert whole[0].any() and whole[1].isfinite().all()

    def test_an_error_is_raised_everywhere(self) -> None:
        first, second = ranks(2).run(fails_on_one)
        assert "RuntimeError: rank 1 cannot take part" in first and "ValueError" in second
        assert "OSError" in first and "rank 0 cannot take part" in second

    def test_shards_are_reset_where_they_are(self, tmp_path: Path) -> None:
        expected = sharded(0, None)
        for found in ranks(2).run(sharded, str(tmp_path / "saved")):
            assert differences(found, expected) == []


def sharded(rank: int, path: str | None) -> list[Tensor]:
    """Has a checkpoint in between if there are ranks."""
    encoders = encoders_of(2)
    if path is not None:
        mesh = init_device_mesh("cpu", (2,))
        for encoder in encoders.values():
            fully_shard(encoder, mesh=mesh)
    relearning = mmfuse.ReLearning(encoders)
    if path is not None:
        dcp.save({"method": relearning}, checkpoint_id=path)
    others = encoders if path is None else encoders_of(2, seed=1)
    if path is not None:
        mesh = init_device_mesh("cpu", (2,))
        for encoder in others.values():
            fully_shard(encoder, mesh=mesh)
        relearning = mmfuse.ReLearning(others)
        dcp.load({"method": relearning}, checkpoint_id=path)
    with torch.no_grad():
        for i, p in enumerate(others.parameters()):
            p.copy_(torch.full_like(p, 0.5 * i))
    relearning.reset(torch.tensor([0.25, 0.75]))
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in others.parameters()]
