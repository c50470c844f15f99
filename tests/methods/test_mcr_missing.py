"""MCR with samples that lack modalities, and with outputs of other tasks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor, nn
from ways import bad_masks, some, spoilt

import mmfuse
from mmfuse.methods._mcr_parts import nt_xent, orders_of

ROWS = 7


def batch(count: int, device: Any = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Features, logits and labels."""
    generator = torch.Generator().manual_seed(count)
    features, logits = {}, {}
    for m in range(count):
        x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
        z = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
        features[f"m{m}"] = x.to(device).requires_grad_()
        logits[f"m{m}"] = z.to(device).requires_grad_()
    return features, logits, (torch.arange(ROWS) % 3).to(device)


def js(a: Tensor, b: Tensor) -> Tensor:
    """0-d, of two rows of logits."""
    p, q = a.softmax(0), b.softmax(0)
    mean = (p + q) / 2
    return ((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum()) / 2


def masks(count: int, case: str, device: Any) -> dict[str, Tensor]:
    found = some(count, ROWS, 3, device)
    if case == "gone":
        found["m1"] = torch.zeros_like(found["m1"])
    return found


def written(
    logits: dict[str, Tensor], present: dict[str, Tensor], permutations: int, seed: int
) -> list[Tensor | None]:
    """J_m, sample by sample; None for a modality that nobody has."""
    stream = mmfuse.NoiseStream(seed)
    zeros = torch.zeros(3, dtype=torch.float64, device=logits["m0"].device)

    def joint(i: int, of_m: str, whose: int) -> Tensor:
        each = [z[whose if n == of_m else i] if present[n][i] else zeros for n, z in logits.items()]
        return sum(each, zeros)

    found: list[Tensor | None] = []
    for m, name in enumerate(logits):
        drawn = stream.uniform(ROWS * permutations, m).view(permutations, ROWS)
        mine = present[name].nonzero().flatten().tolist()
        terms = []
        for row in drawn:
            # The i-th sample that is there gets the feature of the i-th by its number.
            order = sorted(mine, key=lambda i: float(row[i]))
            pairs = zip(mine, order, strict=True)
            terms += [js(joint(i, name, j), joint(i, name, i)) for i, j in pairs]
        found.append(sum(terms) / len(terms) if terms else None)
    return found


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", ["some", "gone"])
def test_features_are_exchanged_among_those_who_have_them(
    cell: Cell, count: int, case: str
) -> None:
    features, logits, _ = batch(count, cell.device)
    present = masks(count, case, cell.device)
    mcr = mmfuse.MCR(
        0.5,
        "collaborative",
        contrast=0.0,
        permutations=3,
        num_modalities=count,
        stream=mmfuse.NoiseStream(5, cell.device),
        backend=cell.backend,
    )
    given = spoilt(logits, present)
    out = mcr(spoilt(features, present), given, present=present)
    every = written(logits, present, 3, 5)
    for value, shown in zip(every, out.contributions.tolist(), strict=True):
        wanted = math.nan if value is None else float(value.detach())
        assert shown == pytest.approx(wanted, nan_ok=True)
    loss = -0.5 * sum(x for x in every if x is not None)
    torch.testing.assert_close(out.loss, loss)
    assert out.loss < -1e-3
    found = torch.autograd.grad(out.loss, list(given.values()))
    expected = torch.autograd.grad(loss, list(logits.values()), materialize_grads=True)
    torch.testing.assert_close(found, expected)


def test_who_is_not_there_stays_where_he_is() -> None:
    drawn = torch.rand(50, ROWS)
    here = torch.tensor([True, False, True, True, False, True, True])
    found = orders_of(drawn, here)
    assert torch.equal(found[:, ~here], torch.tensor([1, 4]).expand(50, -1))
    assert torch.equal(found.sort(1).values, torch.arange(ROWS).expand(50, -1))
    assert len({tuple(row) for row in found.tolist()}) > 20
    everyone = torch.ones(ROWS, dtype=torch.bool)
    assert torch.equal(orders_of(drawn, everyone), orders_of(drawn, None))
    assert torch.equal(orders_of(drawn, ~everyone), torch.arange(ROWS).expand(50, -1))


def test_the_contrast_is_of_the_rows_that_there_are() -> None:
    features, _, labels = batch(3)
    present = masks(3, "gone", "cpu")
    mask = torch.stack(list(present.values()))
    filled = [torch.where(present[n].unsqueeze(1), x, 0) for n, x in features.items()]
    found = nt_xent(filled, labels, 0.5, mask)
    # The loss is that of one modality which has those rows alone.
    rows = torch.cat([x[present[n]] for n, x in features.items()])
    classes = torch.cat([labels[here] for here in present.values()])
    torch.testing.assert_close(found, nt_xent([rows], classes, 0.5))
    assert found > 0.1
    mcr = mmfuse.MCR(0.0, contrast=2.0, num_modalities=3, permutations=1)
    z = {n: torch.zeros(ROWS, 3) for n in features}
    out = mcr(spoilt(features, present), z, labels, present=present)
    torch.testing.assert_close(out.loss.double(), 2 * found)


def test_a_head_gets_zeros_for_what_is_missing() -> None:
    features, _, labels = batch(2)
    present = masks(2, "some", "cpu")
    head = nn.Linear(10, 3).double()
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x)
        return head(x)

    found = []
    for given in (features, spoilt(features, present)):
        mcr = mmfuse.MCR(permutations=2, stream=mmfuse.NoiseStream(3))
        out = mcr(given, labels=labels, head=watched, present=present)
        grads = torch.autograd.grad(out.loss, list(given.values()))
        for grad, here in zip(grads, present.values(), strict=True):
            assert not grad[~here].any() and grad[here].any()
        found.append([out.loss.detach(), *grads])
    torch.testing.assert_close(*found)
    whole = seen[1]  # the batch as it is, behind the first permutations
    assert len(whole) == ROWS and not whole[~present["m0"], :5].any()


def test_nobody_at_all_adds_nothing() -> None:
    features, logits, labels = batch(2)
    nobody = dict.fromkeys(features, torch.zeros(ROWS, dtype=torch.bool))
    mcr = mmfuse.MCR(permutations=2)
    given = spoilt(features, nobody), spoilt(logits, nobody)
    out = mcr(*given, labels, present=nobody)
    assert out.loss == 0 and out.contributions.isnan().all()
    for grad in torch.autograd.grad(out.loss, [x for g in given for x in g.values()]):
        assert not grad.any()


TASKS = {
    "places": ((ROWS, 3, 4), None),
    "tags": ((ROWS, 3), nn.BCEWithLogitsLoss()),
    "single": ((ROWS, 1), nn.BCEWithLogitsLoss()),
    "vector": ((ROWS,), nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize("task", TASKS)
def test_outputs_of_other_tasks(task: str) -> None:
    """Places and outputs count as samples do, and move together."""
    shape, criterion = TASKS[task]
    features, _, _ = batch(2)
    logits = {n: torch.randn(shape, dtype=torch.float64) for n in features}
    mcr = mmfuse.MCR(
        contrast=0.0, permutations=2, criterion=criterion, stream=mmfuse.NoiseStream(5)
    )
    out = mcr(features, logits)
    stream, found = mmfuse.NoiseStream(5), []
    for m, name in enumerate(logits):
        order = stream.uniform(ROWS * 2, m).view(2, ROWS).argsort(1)
        each = []
        for row in order:
            sides = [sum(logits.values()), sum(logits.values()) - logits[name] + logits[name][row]]
            if criterion is None:
                flat = [z.movedim(1, -1).reshape(-1, 3) for z in sides]
            else:
                flat = [torch.stack([z.flatten(), torch.zeros(z.numel())], 1) for z in sides]
            each += [js(a, b) for a, b in zip(*flat, strict=True)]
        found.append(sum(each) / len(each))
    torch.testing.assert_close(out.contributions, torch.stack(found))
    everyone = {n: torch.ones(ROWS, dtype=torch.bool) for n in features}
    told = mmfuse.MCR(
        contrast=0.0, permutations=2, criterion=criterion, stream=mmfuse.NoiseStream(5)
    )(features, logits, present=everyone)
    torch.testing.assert_close(told.contributions, out.contributions)


def test_a_class_that_the_criterion_ignores_has_no_contrast() -> None:
    features, logits, labels = batch(2)
    ignored = torch.where(labels == 2, -100, labels)
    options: dict[str, Any] = {"strength": 0.0, "permutations": 1}
    found = mmfuse.MCR(criterion=nn.CrossEntropyLoss(ignore_index=2), **options)
    want = mmfuse.MCR(**options)(features, logits, ignored).contrast
    assert found(features, logits, labels).contrast == want
    assert mmfuse.MCR(**options)(features, logits, labels).contrast != want


def test_what_has_no_classes_has_no_contrast() -> None:
    features, logits, labels = batch(2)
    mcr = mmfuse.MCR(criterion=nn.BCEWithLogitsLoss())
    with pytest.raises(TypeError, match=r"class indices, for the contrast; .*contrast=0 leaves it"):
        mcr(features, logits, labels.double())
    dense = {n: z.unsqueeze(2) for n, z in logits.items()}
    with pytest.raises(ValueError, match=r"labels must have shape \[7\], got \[7, 1\]; contrast=0"):
        mmfuse.MCR()(features, dense, labels.unsqueeze(1))
    with pytest.raises(ValueError, match=r"logits\['head'\] must be \[B, C\] or .* got \[14\]"):
        mmfuse.MCR(permutations=2)(features, labels=labels, head=lambda x: x[:, 0])


@pytest.mark.parametrize(("change", "error", "text"), bad_masks(ROWS))
def test_bad_masks_draw_nothing(
    change: dict[str, Tensor], error: type[Exception], text: str
) -> None:
    features, logits, labels = batch(2)
    mcr = mmfuse.MCR()
    before = mcr.noise_state.clone()
    with pytest.raises(error, match=text):
        mcr(features, logits, labels, present={**some(2, ROWS, 0), **change})
    assert torch.equal(mcr.noise_state, before)
