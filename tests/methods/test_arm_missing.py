"""ARM with samples that miss modalities, with other losses, and with scores of the user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import ways
from no_sync import no_host_sync
from ranks import ranks
from torch import Tensor, nn

import mmfuse
from mmfuse import ARM

NAMES = ("a", "v", "t")
ROWS = 32


def batch(count: int = 3, rows: int = ROWS, seed: int = 0) -> dict[str, Any]:
    """Features after a ReLU, of which the fused ones have the first most."""
    torch.manual_seed(seed)
    names = NAMES[:count]
    features = {n: torch.randn(rows, 20).relu() for n in names}
    fused = sum((0.8 - 0.2 * m) * f for m, f in enumerate(features.values()))
    logits = {n: torch.randn(rows, 4) for n in names}
    return {
        "features": features,
        "fused": fused,
        "logits": logits,
        "fused_logits": torch.randn(rows, 4),
        "labels": torch.randint(0, 4, (rows,)),
    }


def of(given: dict[str, Any], rows: Any) -> dict[str, Any]:
    """Some rows of it."""
    return {
        k: {n: x[rows] for n, x in v.items()} if isinstance(v, dict) else v[rows]
        for k, v in given.items()
    }


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        k: {n: x for n, x in v.items() if n != name} if isinstance(v, dict) else v
        for k, v in given.items()
    }


def everyone(count: int = 3) -> dict[str, Tensor]:
    return ways.everyone(NAMES[:count], ROWS)


def masks(count: int, share: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {n: torch.rand(ROWS, generator=generator) >= share for n in NAMES[:count]}


def spoilt(given: dict[str, Any], present: dict[str, Tensor]) -> dict[str, Any]:
    """NaN where a modality is missing, as an encoder of nothing may return."""
    for key in ("features", "logits"):
        for name, x in given[key].items():
            x[~present[name]] = torch.nan
    given["fused"][~torch.stack(list(present.values())).all(0)] = torch.nan
    return given


def numbers(out: Any) -> list[Tensor]:
    return [out.weights, out.scores, out.contributions, out.nmi, out.ncmi]


@pytest.fixture(params=["paper", "official"])
def made(request: pytest.FixtureRequest) -> Any:
    """Makes an ARM of few bins."""
    make = ARM if request.param == "paper" else ARM.official
    return lambda count, **options: make(8, num_modalities=count, **options)


@pytest.mark.parametrize("count", [2, 3])
def test_with_all_present_nothing_changes(made: Any, count: int) -> None:
    plain, masked = made(count), made(count)
    expected = plain(**batch(count))
    found = masked(**batch(count), present=everyone(count))
    # The entropies of the same counts are added up in another order.
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(masked.state_dict(), plain.state_dict(), rtol=1e-6, atol=0)
    assert float((found.weights - 1).abs().max()) > 0.01


@pytest.mark.parametrize("count", [2, 3])
def test_what_a_sample_without_all_modalities_holds_does_not_matter(made: Any, count: int) -> None:
    present = masks(count)
    rows = torch.stack(list(present.values())).all(0)
    assert 8 < int(rows.sum()) < ROWS
    expected = made(count)(**of(batch(count), rows))
    found = made(count)(**spoilt(batch(count), present), present=present)
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=1e-6, atol=1e-12)
    assert bool(found.weights.isfinite().all())


@pytest.mark.parametrize("count", [2, 3])
def test_one_that_is_missing_from_the_batch_weighs_1_and_is_left_out(made: Any, count: int) -> None:
    present = {**masks(count), "v": torch.zeros(ROWS, dtype=torch.bool)}
    arm = made(count)
    found = arm(**spoilt(batch(count), {**everyone(count), "v": present["v"]}), present=present)
    # The fused rows are NaN then, all of them: only the weights' shape can be looked at.
    assert found.weights[1] == 1
    given = batch(count)
    for key in ("features", "logits"):
        given[key]["v"][:] = torch.nan
    found = arm(**given, present=present)
    assert found.weights[1] == 1 and bool(found.contributions[1].isnan())
    assert bool(found.weights.isfinite().all())
    assert arm.average_weight == 0 and not bool(arm.average.any())
    if count == 2:
        assert found.weights.tolist() == [1.0, 1.0]
        return
    rows = present["a"] & present["t"]
    two = made(2)(**without(of(batch(count), rows), "v"))
    for got, want in zip(numbers(found), numbers(two), strict=True):
        torch.testing.assert_close(got[[0, 2]], want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_without_a_common_sample_the_average_is_taken(made: Any, count: int) -> None:
    arm = made(count)
    arm(**batch(count))
    before = arm.average / arm.average_weight
    state = {k: v.clone() for k, v in arm.state_dict().items()}
    turns = torch.arange(ROWS) % count
    present = {n: turns == m for m, n in enumerate(NAMES[:count])}
    out = arm(**batch(count, seed=4), present=present)
    torch.testing.assert_close(out.weights, before, rtol=1e-12, atol=0)
    torch.testing.assert_close(dict(arm.state_dict()), state, rtol=0, atol=0)


def test_nobody_is_there() -> None:
    arm = ARM(8, num_modalities=3)
    nobody = {n: ~m for n, m in everyone().items()}
    assert arm(**batch(), present=nobody).weights.tolist() == [1.0] * 3
    assert arm.average_weight == 0


def test_a_value_that_is_not_finite_shows_where_it_counts() -> None:
    given = batch()
    given["features"]["a"][3, 5] = torch.nan
    present = everyone()
    assert bool(ARM(8, num_modalities=3)(**given, present=present).weights.isnan().any())
    present["a"][3] = False
    assert bool(ARM(8, num_modalities=3)(**given, present=present).weights.isfinite().all())


def test_missingness_that_is_not_random_fakes_no_dominance() -> None:
    """Equal modalities; one is missing on the hard samples, so that its own mean is higher."""
    given = batch(2)
    for key in ("features", "logits"):
        given[key]["v"] = given[key]["a"]
    p = given["logits"]["a"].softmax(1)[torch.arange(ROWS), given["labels"]]
    present = {"a": p > 0.2, "v": torch.ones(ROWS, dtype=torch.bool)}
    out = ARM(8)(**given, present=present)
    torch.testing.assert_close(out.weights, torch.ones(2).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.scores[0].item(), float(p[p > 0.2].double().mean()))


def test_does_not_wait_for_the_device() -> None:
    arm, given, present = ARM(8, num_modalities=3), batch(), masks(3)
    arm(**given, present=present)
    with no_host_sync("cpu"):
        out = arm(**given, present=present)
    assert bool(out.weights.isfinite().all())


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("more", ["present", "scores"])
def test_compiles_without_a_graph_break(more: str) -> None:
    eager, compiled = (ARM(8, num_modalities=3) for _ in range(2))
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for share in (0.1, 0.4):
        given = batch()
        if more == "present":
            wanted: dict[str, Any] = {"present": masks(3, share)}
        else:
            given = {k: given[k] for k in ("features", "fused")}
            wanted = {"scores": {n: torch.tensor(0.5) for n in (*NAMES, "fused")}}
        out, want = fast(**given, **wanted), eager(**given, **wanted)
        assert torch.equal(out.weights, want.weights)
    assert torch.equal(compiled.average, eager.average) and bool(eager.average.any())


LOSSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "weights and ignored rows": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 0.5]), ignore_index=2),
        lambda: torch.randint(0, 4, (ROWS,)),
        {"weight": torch.tensor([1.0, 2.0, 3.0, 0.5]), "ignore_index": 2},
    ),
    "several labels": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0, 0.5])),
        lambda: torch.randint(0, 2, (ROWS, 4)).float(),
        {"multilabel": True, "pos_weight": torch.tensor([1.0, 2.0, 3.0, 0.5])},
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_criterion_says_how_logits_are_scored(loss: str, masked: bool) -> None:
    criterion, labels, keywords = LOSSES[loss]
    given = {**batch(), "labels": labels()}
    arm = ARM(8, num_modalities=3, criterion=criterion)
    present = masks(3) if masked else everyone()
    out = arm(**given, **({"present": present} if masked else {}))
    rows = torch.stack(list(present.values())).all(0)
    z = [x[rows] for x in given["logits"].values()]
    want = mmfuse.ops.modality_scores(z, given["labels"][rows], **keywords)
    torch.testing.assert_close(out.scores.float(), want.prob)
    assert not list(arm.parameters()) and "criterion" not in dict(arm.named_modules())
    plain = ARM(8, num_modalities=3)
    if loss != "several labels":
        other = plain(**given, **({"present": present} if masked else {}))
        assert not torch.equal(other.scores, out.scores)


def test_scores_of_ones_own() -> None:
    given = batch()
    every = [*given["logits"].values(), given["fused_logits"]]
    prob = mmfuse.ops.modality_scores(every, given["labels"]).prob
    want = ARM(8, num_modalities=3)(**given)
    arm = ARM(8, num_modalities=3)
    own = dict(zip((*NAMES, "fused"), prob, strict=True))
    out = arm(given["features"], given["fused"], scores=own)
    torch.testing.assert_close(numbers(out), numbers(want), rtol=1e-6, atol=1e-12)
    # NaN for one that is missing.
    gone = arm(given["features"], given["fused"], scores={**own, "v": float("nan")})
    present = {**everyone(), "v": torch.zeros(ROWS, dtype=torch.bool)}
    masked = ARM(8, num_modalities=3)(**given, present=present)
    torch.testing.assert_close(gone.weights, masked.weights, rtol=1e-6, atol=0)
    assert gone.weights[1] == 1 and gone.weights[0] != 1


def on_a_rank(rank: int, present: dict[str, Tensor], own: bool) -> list[Tensor]:
    mine = slice(0, 12) if rank == 0 else slice(12, ROWS)
    given = of(batch(), mine)
    arm = ARM(8, num_modalities=3)
    if own:
        scores = dict.fromkeys((*NAMES, "fused"), 0.2 + 0.1 * rank)
        if not rank:
            scores["v"] = float("nan")
        out = arm(given["features"], given["fused"], scores=scores)
    else:
        out = arm(**given, present={n: m[mine] for n, m in present.items()})
    return [*numbers(out), arm.average]


@pytest.mark.parametrize("own", [False, True])
def test_a_rank_without_a_modality_leaves_the_word_to_the_other(own: bool) -> None:
    present = everyone()
    present["v"][:12] = False
    first, second = ranks(2).run(on_a_rank, present, own)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    given = of(batch(), slice(12, ROWS))
    arm = ARM(8, num_modalities=3)
    if own:
        own_scores = dict.fromkeys((*NAMES, "fused"), 0.3)
        want = arm(given["features"], given["fused"], scores=own_scores)
    else:
        want = arm(**given)
    torch.testing.assert_close(first, [*numbers(want), arm.average], rtol=1e-6, atol=1e-12)
    assert float((first[0] - 1).abs().max()) > 0.01


def test_ranks_are_weighed_by_their_complete_samples() -> None:
    present = everyone()
    present["a"][:4] = present["t"][20:22] = False
    first, _ = ranks(2).run(on_a_rank, present, False)
    parts = []
    for rows in (torch.arange(4, 12), torch.cat([torch.arange(12, 20), torch.arange(22, ROWS)])):
        parts.append((len(rows), ARM(8, num_modalities=3)(**of(batch(), rows))))
    for k in (1, 3, 4):  # scores, nmi, ncmi
        mean = sum(n * numbers(out)[k] for n, out in parts) / sum(n for n, _ in parts)
        torch.testing.assert_close(first[k], mean, rtol=1e-6, atol=1e-12)


def refused_on_a_rank(rank: int) -> str:
    given, present = batch(), everyone()
    if rank:
        present["a"] = present["a"].float()
    with pytest.raises((TypeError, RuntimeError)) as raised:
        ARM(8, num_modalities=3)(**given, present=present)
    return f"{raised.type.__name__}: {raised.value}"


def test_a_wrong_mask_on_one_rank_is_an_error_on_all() -> None:
    first, second = ranks(2).run(refused_on_a_rank)
    assert first.startswith("RuntimeError: rank 1 cannot take this step")
    assert second == "TypeError: present['a'] must be a bool tensor [B], got torch.float32"


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "length": (
        {"present": {n: torch.ones(3, dtype=torch.bool) for n in NAMES}},
        ValueError,
        r"present\['a'\] must have shape \[32\]",
    ),
    "names": ({"present": {"a": torch.ones(ROWS, dtype=torch.bool)}}, ValueError, "missing"),
    "labels": (
        {"present": everyone(), "labels": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"labels has shape \[3\], features\['a'\] has 32 rows",
    ),
    "both": ({"scores": dict.fromkeys(NAMES, 1.0)}, TypeError, "got scores and logits"),
    "no fused": (
        {"scores": dict.fromkeys(NAMES, 1.0), "logits": None},
        ValueError,
        r"missing \['fused'\]",
    ),
    "ratios": ({"ratios": dict.fromkeys(NAMES, 1.0)}, TypeError, "ARM takes no ratios"),
    "coefficients": ({"coefficients": dict.fromkeys(NAMES, 1.0)}, TypeError, "takes no coeff"),
    "unknown": ({"mask": {}}, TypeError, r"unexpected arguments: \['mask'\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named_before_anything_changes(name: str) -> None:
    wrong, error, message = WRONG[name]
    arm = ARM(8, num_modalities=3)
    with pytest.raises(error, match=message):
        arm(**{**batch(), **wrong})
    assert arm.average_weight == 0
    with pytest.raises(TypeError, match=r"criterion must be nn\.CrossEntropyLoss"):
        ARM(criterion=nn.MSELoss())


def test_contributions_of_samples_that_miss_modalities() -> None:
    """Each sample's are those among the modalities that it has; of one alone nothing is known."""
    given, present = batch(), masks(3, 0.4)
    logits, fused_logits, labels = (given[k] for k in ("logits", "fused_logits", "labels"))
    whole = mmfuse.sample_contributions(logits, fused_logits, labels, bins=3)
    for name, z in logits.items():
        z[~present[name]] = torch.nan
    found = mmfuse.sample_contributions(logits, fused_logits, labels, bins=3, present=present)
    mask = torch.stack([present[n] for n in NAMES], 1)
    known = mask & (mask.sum(1, keepdim=True) > 1)
    assert torch.equal(found.isfinite(), known)
    assert {int(n) for n in mask.sum(1)} >= {1, 2, 3}
    for i, has in enumerate(mask):
        names = [n for n, there in zip(NAMES, has, strict=True) if there]
        if len(names) == 2:
            rows = {n: logits[n][i : i + 1] for n in names}
            want = mmfuse.sample_contributions(
                rows, fused_logits[i : i + 1], labels[i : i + 1], bins=3
            )
            torch.testing.assert_close(found[i : i + 1, has], want, rtol=1e-9, atol=1e-12)
    full = mask.all(1)
    torch.testing.assert_close(found[full], whole[full], rtol=1e-9, atol=1e-12)
    sampler = mmfuse.ContributionSampler(found, present=mask)
    assert len(sampler) > ROWS
    with pytest.raises(ValueError, match="missing"):
        mmfuse.sample_contributions(logits, fused_logits, labels, present={"a": present["a"]})
