"""PMR: its loss from its definition, its prototypes, and odd inputs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cells import Cell
from parallel import counted
from ranks import ranks
from states import differences
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mmfuse
from mmfuse.methods._pmr_rule import prototype_ratios

NAMES = ("audio", "visual", "text", "touch")
CLASSES, STEPS = 4, 25
Batch = tuple[dict[str, Tensor], Tensor]


def batch(count: int, rows: int = 12, seed: int = 0, **kind: Any) -> Batch:
    """Features of which the first say more about the class than the last; widths differ."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    features = {}
    for m, name in enumerate(NAMES[:count]):
        x = torch.randn(rows, 3 + m, generator=generator, dtype=torch.float64)
        x[:, 0] += labels * (1.5 if m == seed % count else 0.2)
        features[name] = x.to(**kind).requires_grad_()
    return features, labels.to(kind.get("device", "cpu"))


def class_means(batches: list[Batch], name: str) -> Tensor:
    rows = torch.cat([f[name].detach() for f, _ in batches])
    labels = torch.cat([y for _, y in batches])
    return torch.stack([rows[labels == c].mean(0) for c in range(CLASSES)])


def transcribed(
    features: dict[str, Tensor], labels: Tensor, prototypes: list[Tensor], alpha: float, mu: float
) -> dict[str, Tensor]:
    """The paper's equations, sample by sample and pair by pair."""
    scores, pce, entropy = [], [], []
    for x, c in zip(features.values(), prototypes, strict=True):
        s = p = h = torch.zeros((), dtype=x.dtype)
        for row, label in zip(x, labels.tolist(), strict=True):
            d = torch.stack([(row - each).square().sum().sqrt() for each in c])
            pi = torch.exp(-d) / torch.exp(-d).sum()
            s, p, h = s + pi[label], p - pi[label].log(), h - (pi * pi.log()).sum()
        scores.append(s.item() / len(labels))
        pce.append(p / len(labels))
        entropy.append(h / len(labels))
    loss = torch.zeros((), dtype=pce[0].dtype)
    k = []
    for m, s in enumerate(scores):
        others = [t for j, t in enumerate(scores) if j != m]
        k.append(min(max(max(others) / s - 1, 0), 1))
        e = min(max(s / min(others) - 1, 0), 1)
        loss = loss + alpha * k[m] * pce[m] - mu * e * entropy[m]
    return {
        "loss": loss,
        "coefficients": torch.tensor(k, dtype=torch.float64),
        "scores": torch.tensor(scores, dtype=torch.float64),
        "ratios": torch.tensor(
            [s / min(t for j, t in enumerate(scores) if j != m) for m, s in enumerate(scores)],
            dtype=torch.float64,
        ),
        "prototype_losses": torch.stack(pce).detach(),
        "entropies": torch.stack(entropy).detach(),
    }


# Sums of at most 12 rows, 4 classes and 6 squares, whose terms are below 20: 100 roundings of 20.
CLOSE = {"rtol": 0.0, "atol": 2000 * UNIT_ROUNDOFF[torch.float64]}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_papers_equations(cell: Cell, count: int) -> None:
    cell.skip_slow(count > 2)
    pmr = mmfuse.PMR(1.5, 0.3, 0.4, num_modalities=count, backend=cell.backend).to(cell.device)
    first = [batch(count, 20, 100 + i, device=cell.device) for i in range(2)]
    second = [batch(count, 24, 200, device=cell.device)]
    pmr.update_prototypes(first)
    pmr.update_prototypes(iter(second))
    expected = [
        0.4 * class_means(first, name) + 0.6 * class_means(second, name) for name in first[0][0]
    ]
    for found, wanted in zip(pmr.prototypes, expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    seen = set()
    for step in range(3 if cell.backend == "triton" else STEPS):
        features, labels = batch(count, seed=step, device=cell.device)
        out = pmr(features, labels)
        on_cpu = {name: x.detach().cpu().requires_grad_() for name, x in features.items()}
        prototypes = [c.cpu() for c in expected]
        wanted = transcribed(on_cpu, labels.cpu(), prototypes, 1.5, 0.3)
        for name, value in wanted.items():
            found = getattr(out, name).detach().cpu()
            torch.testing.assert_close(found, value.detach().to(found), **CLOSE, msg=name)
        out.loss.backward()
        wanted["loss"].backward()
        for name, x in features.items():
            torch.testing.assert_close(x.grad.cpu(), on_cpu[name].grad, **CLOSE)
        seen |= {m for m in range(count) if out.coefficients[m] > 0}
    assert seen >= {0, 1}, "each was behind once"


@pytest.mark.parametrize("count", [2, 3])
def test_official_clips_nothing_and_adds_no_entropy(count: int) -> None:
    pmr = mmfuse.PMR.official(2.0, num_modalities=count)
    pmr.set_epoch(0)
    pmr.update_prototypes([batch(count, 20, 100)])
    for step in range(STEPS):
        features, labels = batch(count, seed=step)
        out = pmr(features, labels)
        behind = out.scores < out.scores.max()
        assert out.coefficients.tolist() == (2.0 * behind).tolist()
        torch.testing.assert_close(out.loss, (2.0 * behind * out.prototype_losses).sum())
        assert out.entropies is None


@pytest.mark.parametrize("made", [mmfuse.PMR, mmfuse.PMR.official])
def test_a_tie_draws_nobody(made: Any) -> None:
    pmr = made(num_modalities=3)
    pmr.set_epoch(0)
    x, labels = batch(2)
    same = dict.fromkeys(NAMES[:3], x["audio"])
    pmr.update_prototypes([(same, labels)])
    out = pmr(same, labels)
    assert out.coefficients.tolist() == [0, 0, 0] and out.loss == 0
    assert out.ratios.tolist() == [1, 1, 1]


def test_ratios_of_scores_that_are_nan_or_zero() -> None:
    nan = math.nan
    for scores, ahead, behind in [
        ([0.2, 0.4], [0.5, 2], [2, 0.5]),
        ([0.2, 0.4, 0.8], [0.5, 2, 4], [4, 2, 0.5]),
        ([0.2, nan, 0.8], [0.25, nan, 4], [4, nan, 0.25]),
        ([nan, 0.5], [nan, nan], [nan, nan]),
        ([0.0, 0.5], [0, math.inf], [math.inf, 0]),
        ([0.0, 0.0], [nan, nan], [nan, nan]),
    ]:
        found = prototype_ratios(torch.tensor(scores, dtype=torch.float64))
        expected = tuple(torch.tensor(x, dtype=torch.float64) for x in (ahead, behind))
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_modality_that_is_nan_leaves_the_others_alone() -> None:
    pmr = mmfuse.PMR(num_modalities=3)
    pmr.update_prototypes([batch(3, 20, 100)])
    features, labels = batch(3)
    with torch.no_grad():
        features["visual"][2] = torch.nan
    out = pmr(features, labels)
    assert out.scores.isnan().tolist() == [False, True, False]
    assert out.coefficients[1] == 0 and out.loss.isfinite() and out.loss != 0
    out.loss.backward()
    assert features["audio"].grad.isfinite().all() and features["text"].grad.isfinite().all()


def test_a_feature_on_its_prototype_has_a_gradient() -> None:
    """The gradient of a square root would be infinite there."""
    pmr = mmfuse.PMR()
    features, labels = batch(2, 20, 100)
    pmr.update_prototypes([(features, labels)])
    at = {name: c[labels[:5]].clone() for name, c in zip(features, pmr.prototypes, strict=True)}
    at["audio"] += 0.1
    for x in at.values():
        x.requires_grad_()
    pmr(at, labels[:5]).loss.backward()
    assert all(x.grad.isfinite().all() for x in at.values())


class TestClassesWithoutSamples:
    def test_an_old_prototype_stays(self) -> None:
        pmr = mmfuse.PMR(momentum=0.5)
        features, labels = batch(2, 20, 100)
        pmr.update_prototypes([(features, labels)])
        before = [c.clone() for c in pmr.prototypes]
        rest = labels != 1
        pmr.update_prototypes([({n: 2 * x[rest] for n, x in features.items()}, labels[rest])])
        for old, new in zip(before, pmr.prototypes, strict=True):
            assert torch.equal(new[1], old[1])
            torch.testing.assert_close(new[[0, 2, 3]], 1.5 * old[[0, 2, 3]])

    def test_one_that_never_had_any_has_no_part(self) -> None:
        features, labels = batch(2, 20, 100)
        rest = labels != 1
        pmr, without = mmfuse.PMR(num_classes=CLASSES), mmfuse.PMR()
        some = {name: x[rest] for name, x in features.items()}
        pmr.update_prototypes([(some, labels[rest])])
        assert [c.isnan().any(1).tolist() for c in pmr.prototypes] == [
            [False, True, False, False]
        ] * 2
        # The same three classes by other numbers.
        renamed = torch.where(labels > 1, labels - 1, labels)
        without.update_prototypes([(some, renamed[rest])])
        out = pmr(features, labels)
        alone = {name: x[rest].detach().requires_grad_() for name, x in features.items()}
        expected = without(alone, renamed[rest])
        for name in ("loss", "scores", "coefficients", "prototype_losses", "entropies"):
            torch.testing.assert_close(getattr(out, name), getattr(expected, name))
        out.loss.backward()
        expected.loss.backward()
        for name, x in features.items():
            torch.testing.assert_close(x.grad[rest], alone[name].grad)
            assert not x.grad[~rest].any()

    def test_it_gets_one_later(self) -> None:
        features, labels = batch(2, 20, 100)
        rest = labels != 1
        pmr = mmfuse.PMR(num_classes=CLASSES)
        pmr.update_prototypes([({n: x[rest] for n, x in features.items()}, labels[rest])])
        pmr.update_prototypes([(features, labels)])
        for c, name in zip(pmr.prototypes, features, strict=True):
            torch.testing.assert_close(c, class_means([(features, labels)], name))

    def test_official_has_nan_for_ever(self) -> None:
        features, labels = batch(2, 20, 100)
        rest = labels != 1
        pmr = mmfuse.PMR.official(num_classes=CLASSES, ends=None)
        pmr.update_prototypes([({n: x[rest] for n, x in features.items()}, labels[rest])])
        pmr.update_prototypes([(features, labels)])
        assert pmr.prototypes[0].isnan().any(1).tolist() == [False, True, False, False]
        assert pmr(features, labels).scores.isnan().all()

    @pytest.mark.parametrize("labels", [[-100] * 4, [1] * 4])
    def test_a_batch_in_which_nothing_counts(self, cell: Cell, labels: list[int]) -> None:
        features, every = batch(2, 20, 100, device=cell.device)
        rest = every != 1
        pmr = mmfuse.PMR(num_classes=CLASSES, backend=cell.backend).to(cell.device)
        pmr.update_prototypes([({n: x[rest] for n, x in features.items()}, every[rest])])
        four = {name: x[:4].detach().requires_grad_() for name, x in features.items()}
        out = pmr(four, torch.tensor(labels, device=cell.device))
        assert out.loss == 0 and out.coefficients.tolist() == [0, 0]
        assert out.scores.isnan().all()
        (out.loss + sum(x.sum() for x in four.values())).backward()
        assert all((x.grad == 1).all() for x in four.values())


def test_rows_of_no_label_do_not_count() -> None:
    features, labels = batch(2, 20, 100)
    pmr, other = mmfuse.PMR(), mmfuse.PMR()
    wrong = labels.clone()
    wrong[[2, 5]] = -100
    spoiled = {name: x.detach().clone() for name, x in features.items()}
    spoiled["audio"][2] = torch.nan
    rest = wrong != -100
    some = {name: x[rest] for name, x in features.items()}
    pmr.update_prototypes([(spoiled, wrong)])
    other.update_prototypes([(some, labels[rest])])
    for a, b in zip(pmr.prototypes, other.prototypes, strict=True):
        torch.testing.assert_close(a, b)
    found, expected = pmr(features, wrong), other(some, labels[rest])
    for name in ("loss", "scores", "entropies"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("options", "entropic", "acting"),
    [
        ({}, [1, 1, 1], [1, 1, 1]),
        ({"entropy_epochs": 2}, [1, 1, 0], [1, 1, 1]),
        ({"starts": 1, "ends": 1}, [0, 1, 0], [0, 1, 0]),
        ({"mu": 0.0}, [0, 0, 0], [1, 1, 1]),
    ],
)
def test_epochs(options: dict[str, Any], entropic: list[int], acting: list[int]) -> None:
    pmr = mmfuse.PMR(**options)
    pmr.update_prototypes([batch(2, 20, 100)])
    features, labels = batch(2)
    for epoch in range(3):
        pmr.set_epoch(epoch)
        out = pmr(features, labels)
        assert (out.entropies is not None) == entropic[epoch]
        assert bool(out.loss != 0) == bool(out.coefficients.any()) == acting[epoch]
        assert out.scores.isfinite().all()


def test_entropies_that_never_end_are_warned_of_once() -> None:
    pmr = mmfuse.PMR(entropy_epochs=1)
    pmr.update_prototypes([batch(2, 20, 100)])
    with pytest.warns(RuntimeWarning, match="entropy_epochs=1, but set_epoch was never called"):
        pmr(*batch(2))
    pmr(*batch(2))


def test_in_evaluation_it_adds_nothing_and_looks_at_nothing() -> None:
    pmr = mmfuse.PMR().eval()
    out = pmr({"audio": torch.ones(1, 1), "visual": torch.ones(1, 1)})
    assert out.loss == 0 and out.coefficients.tolist() == [0, 0] and out.scores is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_shapes(dtype: torch.dtype) -> None:
    """Feature maps count as vectors; distances are at least in float32."""
    pmr = mmfuse.PMR()
    features, labels = batch(2, 20, 100, dtype=dtype)
    maps = {name: x.unsqueeze(2) for name, x in features.items()}
    pmr.update_prototypes([(maps, labels)])
    assert {c.dtype for c in pmr.prototypes} == {torch.float32}
    out = pmr(maps, labels)
    assert (out.loss.dtype, out.loss.shape) == (torch.float32, ())
    out.loss.backward()
    assert features["audio"].grad.dtype == dtype


def test_names_go_with_their_prototypes_in_any_order() -> None:
    pmr = mmfuse.PMR()
    x, labels = batch(2, 20, 100)
    features = {"audio": x["audio"], "visual": x["visual"][:, 1:]}  # of one width
    pmr.update_prototypes([(features, labels)])
    turned = dict(reversed(features.items()))
    assert torch.equal(pmr(features, labels).scores, pmr(turned, labels).scores)
    before = [c.clone() for c in pmr.prototypes]
    pmr.update_prototypes([(turned, labels)])
    torch.testing.assert_close(pmr.prototypes, before)


class TestState:
    def test_a_new_object_takes_the_shape_of_a_state(self) -> None:
        pmr, other = mmfuse.PMR(), mmfuse.PMR()
        pmr.update_prototypes([batch(2, 20, 100)])
        pmr.set_epoch(3)
        other.load_state_dict(pmr.state_dict())
        features, labels = batch(2)
        assert torch.equal(other(features, labels).loss, pmr(features, labels).loss)
        assert other.epoch == 3
        other.load_state_dict(mmfuse.PMR().state_dict())
        with pytest.raises(RuntimeError, match="no prototypes yet; call update_prototypes"):
            other(features, labels)

    def test_the_next_update_goes_on_from_the_state(self) -> None:
        pmr, other = mmfuse.PMR(), mmfuse.PMR(num_classes=CLASSES, widths=(3, 4)).double()
        pmr.update_prototypes([batch(2, 20, 100)])
        other.load_state_dict(pmr.state_dict())
        for each in (pmr, other):
            each.update_prototypes([batch(2, 20, 101)])
        assert differences(dict(other.state_dict()), dict(pmr.state_dict())) == []

    def test_a_reset_one_has_no_prototypes(self) -> None:
        for options in ({}, {"num_classes": CLASSES, "widths": (3, 4)}):
            pmr, new = mmfuse.PMR(**options), mmfuse.PMR(**options)
            pmr.update_prototypes([batch(2, 20, 100)])
            pmr.reset_parameters()
            assert differences(dict(pmr.state_dict()), dict(new.state_dict())) == []
            with pytest.raises(RuntimeError, match="no prototypes yet"):
                pmr(*batch(2))

    def test_other_widths_are_refused(self) -> None:
        pmr, other = mmfuse.PMR(), mmfuse.PMR(num_classes=CLASSES, widths=(3, 5))
        pmr.update_prototypes([batch(2, 20, 100)])
        with pytest.raises(RuntimeError, match="size mismatch for prototypes_1"):
            other.load_state_dict(pmr.state_dict())

    def test_prototypes_of_no_such_shape_are_refused(self) -> None:
        pmr = mmfuse.PMR()
        broken = {**pmr.state_dict(), "prototypes_0": torch.tensor(torch.nan)}
        with pytest.raises(RuntimeError, match="size mismatch for prototypes_0"):
            pmr.load_state_dict(broken)
        pmr.update_prototypes([batch(2, 20, 100)])

    def test_prototypes_of_an_evaluation_can_be_changed_later(self) -> None:
        """PyTorch refused to write into a tensor that was made in inference mode."""
        pmr, plain = mmfuse.PMR(), mmfuse.PMR()
        with torch.inference_mode():
            pmr.update_prototypes([batch(2, 20, 100)])
        plain.update_prototypes([batch(2, 20, 100)])
        for each in (pmr, plain):
            each.update_prototypes([batch(2, 20, 101)])
        assert differences(dict(pmr.state_dict()), dict(plain.state_dict())) == []
        pmr.load_state_dict(plain.state_dict())


FEATURES, LABELS = batch(2, 20, 100)


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ([], ValueError, "batches is empty"),
        ([FEATURES], TypeError, "pairs .* got dict as number 0; a single batch is"),
        ([(FEATURES, LABELS.double())], TypeError, "labels must be an integer tensor"),
        ([(FEATURES, LABELS[:3])], ValueError, r"labels must have shape \[20\], got \[3\]"),
        ([(FEATURES, LABELS.to("meta"))], ValueError, "labels must be dense and have values"),
        ([(FEATURES, LABELS - 2)], ValueError, "labels are from -2 to 1"),
        ([(FEATURES, LABELS + 1)], ValueError, "labels are from 1 to 4, but there are 4 classes"),
        ([({"audio": LABELS}, LABELS)], ValueError, "num_modalities=2, but features has"),
        ([({**FEATURES, "visual": LABELS}, LABELS)], TypeError, r"features\['visual'\]"),
        (
            [({"audio": FEATURES["audio"], "text": FEATURES["visual"]}, LABELS)],
            ValueError,
            "features and the prototypes name different modalities",
        ),
        (
            [(FEATURES, LABELS), ({**FEATURES, "visual": FEATURES["audio"]}, LABELS)],
            ValueError,
            r"features\['visual'\] has 3 values a sample, in the first batch 4",
        ),
        (
            [({**FEATURES, "audio": FEATURES["visual"]}, LABELS)],
            ValueError,
            r"features\['audio'\] has 4 values a sample, the prototypes have 3",
        ),
        (
            [({**FEATURES, "visual": FEATURES["visual"] / 0}, LABELS)],
            ValueError,
            r"features\['visual'\] holds a NaN or an Inf",
        ),
    ],
)
def test_a_bad_update_changes_nothing(
    batches: list[Any], error: type[Exception], text: str
) -> None:
    pmr = mmfuse.PMR()
    pmr.update_prototypes([(FEATURES, LABELS)])
    before = copy.deepcopy(dict(pmr.state_dict()))
    with pytest.raises(error, match=text):
        pmr.update_prototypes(batches)
    assert differences(dict(pmr.state_dict()), before) == []


def test_bad_input() -> None:
    pmr = mmfuse.PMR()
    with pytest.raises(RuntimeError, match=r"PMR has no prototypes yet; call update_prototypes"):
        pmr(FEATURES, LABELS)
    pmr.update_prototypes([(FEATURES, LABELS)])
    before = copy.deepcopy(dict(pmr.state_dict()))
    for arguments, error, text in [
        ((FEATURES,), TypeError, r"PMR needs labels in training; call eval\(\)"),
        ((FEATURES, LABELS + 1), ValueError, r"labels\[\d+\] = 4 is out of range"),
        ((FEATURES, LABELS - 1), ValueError, r"labels\[\d+\] = -1 is out of range"),
        ((FEATURES, LABELS[:4]), ValueError, r"labels must have shape \[20\]"),
        ((FEATURES, nn.functional.one_hot(LABELS).float()), TypeError, "labels must be an integer"),
        (({"audio": 1, "visual": 2}, LABELS), TypeError, r"features\['audio'\]"),
        (({**FEATURES, "visual": FEATURES["audio"]}, LABELS), ValueError, "the prototypes have 4"),
        (({"a": FEATURES["audio"], "visual": 0}, LABELS), (TypeError, ValueError), "features"),
    ]:
        with pytest.raises(error, match=text):
            pmr(*arguments)
    with pytest.raises(TypeError, match=r"batches must be an iterable of .*, got NoneType"):
        pmr.update_prototypes(None)  # type: ignore[arg-type]
    assert differences(dict(pmr.state_dict()), before) == []


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"alpha": -1.0}, ValueError, "alpha must be a finite number of at least 0"),
        ({"mu": math.inf}, ValueError, "mu must be a finite number of at least 0"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\]"),
        ({"num_modalities": 1}, ValueError, "num_modalities must be at least 2"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"widths": (3, 4)}, ValueError, "widths go with num_classes"),
        ({"widths": (3,), "num_classes": 2}, ValueError, "one number for each of the 2"),
        ({"entropy_epochs": 1.5}, TypeError, "entropy_epochs"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    for made in (mmfuse.PMR, mmfuse.PMR.official):
        with pytest.raises(error, match=text):
            made(**options)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleDict({n: nn.Linear(3 + m, 5) for m, n in enumerate(NAMES[:2])})
        self.double()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: net(inputs[name]) for name, net in self.encoders.items()}


def train(rank: int, size: int) -> dict[str, Any]:
    """Three epochs on this rank's part; the ranks have different numbers of samples."""
    net = Net()
    wrapped = net if size == 1 else DistributedDataParallel(net)
    pmr = mmfuse.PMR(1.0, 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    mine = slice(None) if size == 1 else (slice(0, 5), slice(5, 12))[rank]
    said = []
    with counted(dist) as sizes:
        for epoch in range(3):
            features, labels = batch(2, 12, 50 + epoch)
            labels = labels.sort().values  # so that each rank lacks classes
            with torch.no_grad():
                seen = net({name: x[mine] for name, x in features.items()})
            pmr.update_prototypes([(seen, labels[mine])])
            features, labels = batch(2, 12, epoch)
            optimizer.zero_grad()
            out = pmr(wrapped({name: x[mine] for name, x in features.items()}), labels[mine])
            # DDP takes the mean over ranks.
            rows = len(labels[mine])
            (out.loss * rows * size / 12).backward()
            optimizer.step()
            said.append([out.scores, out.coefficients])
    return {
        "said": said,
        "prototypes": [c.clone() for c in pmr.prototypes],
        "parameters": [p.detach() for p in net.parameters()],
        "reductions": list(sizes),
    }


def test_ranks_are_one_batch() -> None:
    expected, found = train(0, 1), ranks(2).run(train, 2)
    for other in found:
        for key in ("said", "prototypes", "parameters"):
            torch.testing.assert_close(other[key], expected[key], rtol=1e-12, atol=1e-12)
    assert any(k.any() for _, k in expected["said"])


def fails(rank: int) -> str:
    pmr = mmfuse.PMR()
    features, labels = batch(2, 12, rank)
    pmr.update_prototypes([(features, labels)])
    before = copy.deepcopy(dict(pmr.state_dict()))
    bad = labels + 3 * rank
    with pytest.raises((ValueError, RuntimeError)) as caught:
        pmr.update_prototypes([(features, bad)])
    assert differences(dict(pmr.state_dict()), before) == []
    pmr.update_prototypes([(features, labels)])
    return str(caught.value)


def test_every_rank_raises_what_one_has_found() -> None:
    other, culprit = ranks(2).run(fails)
    assert culprit.startswith("labels are from 3 to 6")
    assert other.startswith("rank 1 cannot take this step") and culprit in other
