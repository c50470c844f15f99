"""LFM with samples that lack modalities, and with outputs of other tasks."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from cells import Cell
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from ways import bad_masks, some, spoilt

import mmfuse

ROWS, CLASSES = 12, 4


def batch(count: int, step: int, device: Any = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    logits = {
        f"m{m}": 2 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
        for m in range(count)
    }
    return {n: z.to(device).requires_grad_() for n, z in logits.items()}, labels.to(device)


def gap(a: Tensor, b: Tensor) -> Tensor:
    """0-d, of two distributions [C]."""
    mean = (a + b) / 2
    return ((mean * (mean / a).log()).sum() + (mean * (mean / b).log()).sum()) / 2


def written(logits: dict[str, Tensor], labels: Tensor, present: dict[str, Tensor]) -> Any:
    """z, CE and A, sample by sample."""
    joint, losses = [], []
    for i in range(ROWS):
        mine = [z[i] for n, z in logits.items() if present[n][i]]
        joint.append(sum(mine) / len(mine) if mine else torch.zeros(CLASSES).to(labels.device))
        if mine:
            losses.append(F.cross_entropy(joint[-1], labels[i]))
    of_pairs = []
    for m, n in combinations(logits, 2):
        rows = (present[m] & present[n]).nonzero().flatten().tolist()
        each = [gap(logits[m][i].softmax(0), logits[n][i].softmax(0)) for i in rows]
        if each:
            of_pairs.append(sum(each) / len(each))
    return joint, sum(losses) / len(losses), sum(of_pairs) / max(len(of_pairs), 1)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("gone", [False, True])
def test_each_pair_is_aligned_over_what_both_have(cell: Cell, count: int, gone: bool) -> None:
    lfm = mmfuse.LFM(num_modalities=count, backend=cell.backend).to(cell.device)
    lfm.set_epoch(0)
    for step in range(1 if cell.backend == "triton" else 3):
        logits, labels = batch(count, step, cell.device)
        present = some(count, ROWS, step, cell.device)
        if gone:
            present["m1"] = torch.zeros_like(present["m1"])
        joint, cross_entropy, alignment = written(logits, labels, present)
        given = spoilt(logits, present)
        out = lfm(given, labels, present=present)
        torch.testing.assert_close(out.joint, torch.stack(joint).to(out.joint))
        torch.testing.assert_close(out.cross_entropy, cross_entropy.detach())
        first, second = out.coefficients.tolist()
        if count == 2 and gone:
            assert out.alignment == 0
        else:
            torch.testing.assert_close(out.alignment, alignment.detach())
        wanted = 2 * (first * cross_entropy + second * alignment)
        torch.testing.assert_close(out.loss, wanted)
        found = torch.autograd.grad(out.loss, list(given.values()))
        expected = torch.autograd.grad(wanted, list(logits.values()), materialize_grads=True)
        torch.testing.assert_close(found, expected)


def test_a_masked_class_has_no_gradient_but_that_of_its_row() -> None:
    """A class at −inf is one in both; where one of them is missing there is no divergence."""
    logits, labels = batch(2, 0)
    labels = labels % (CLASSES - 1)
    masked = {n: z.detach().clone() for n, z in logits.items()}
    for z in masked.values():
        z[:, -1] = -torch.inf
        z.requires_grad_()
    present = some(2, ROWS, 0)
    out = mmfuse.LFM()(masked, labels, present=present)
    assert out.loss.isfinite()
    for grad in torch.autograd.grad(out.loss, list(masked.values())):
        assert grad[:, :-1].isfinite().all()


def test_nobody_at_all_is_a_loss_of_0() -> None:
    logits, labels = batch(2, 0)
    nobody = dict.fromkeys(logits, torch.zeros(ROWS, dtype=torch.bool))
    lfm = mmfuse.LFM()
    out = lfm(spoilt(logits, nobody), labels, present=nobody)
    assert out.loss == 0 and not out.joint.any()
    shown = lfm.eval()(spoilt(logits, nobody), present=nobody)
    assert not shown.joint.any()


def test_in_evaluation_the_joint_logits_are_of_who_is_there() -> None:
    logits, labels = batch(3, 0)
    present = some(3, ROWS, 0)
    lfm = mmfuse.LFM(num_modalities=3)
    trained = lfm(logits, labels, present=present).joint
    found = lfm.eval()(spoilt(logits, present), present=present).joint
    torch.testing.assert_close(found, trained)


TASKS: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "places": ((6, 4, 5), torch.randint(0, 4, (6, 5)), None),
    "images": ((2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3)), None),
    "soft": ((6, 4), torch.rand(6, 4).softmax(1), None),
    "tags": ((6, 4), torch.rand(6, 4).round(), nn.BCEWithLogitsLoss()),
    "single": ((6, 1), torch.rand(6, 1).round(), nn.BCEWithLogitsLoss()),
    "vector": ((6,), torch.rand(6).round(), nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize("task", TASKS)
def test_outputs_of_other_tasks(task: str) -> None:
    """The criterion's loss of the mean, and the mean of what each output's distributions say."""
    shape, labels, criterion = TASKS[task]
    logits = {n: torch.randn(shape).requires_grad_() for n in ("m0", "m1")}
    out = mmfuse.LFM(criterion=criterion)(logits, labels)
    a, b = logits.values()
    loss = F.cross_entropy if criterion is None else criterion
    torch.testing.assert_close(out.cross_entropy, loss((a + b) / 2, labels))
    if criterion is not None:
        sides = [torch.stack([z.sigmoid(), 1 - z.sigmoid()], -1).reshape(-1, 2) for z in (a, b)]
    else:
        sides = [z.movedim(1, -1).reshape(-1, 4).softmax(1) for z in (a, b)]
    each = [gap(p, q) for p, q in zip(*sides, strict=True)]
    torch.testing.assert_close(out.alignment, (sum(each) / len(each)).detach())
    grads = torch.autograd.grad(out.loss, [a, b])
    assert all(bool(g.any()) for g in grads)
    everyone = {n: torch.ones(shape[0], dtype=torch.bool) for n in logits}
    told = mmfuse.LFM(criterion=criterion)(logits, labels, present=everyone)
    torch.testing.assert_close(told.loss, out.loss)


def test_places_that_are_ignored_are_not_aligned() -> None:
    logits = {n: torch.randn(3, 4, 5) for n in ("m0", "m1")}
    labels = torch.randint(0, 4, (3, 5))
    labels[:, 3:] = -100
    out = mmfuse.LFM()(logits, labels)
    shorter = {n: z[:, :, :3] for n, z in logits.items()}
    torch.testing.assert_close(out.loss, mmfuse.LFM()(shorter, labels[:, :3]).loss)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.nets = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)) for n in ("m0", "m1")}
        )
        self.double()

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: net(x[n]) for n, net in self.nets.items()}


def learnt(rank: int, present: bool, wrong: int = -1) -> float | str:
    """The weight of the alignment after a look at this rank's samples."""
    net, lfm = Net(), mmfuse.LFM(weighting="learned", rate=20.0)
    lfm.set_epoch(0)
    lfm.weights.fill_(0.5)
    generator = torch.Generator().manual_seed(7 + rank)
    x = {n: torch.randn(8, 3, generator=generator).double() for n in net.nets}
    labels = torch.arange(8) % 3
    masks = {n: torch.arange(8) < 5 for n in x} if present else None
    rows = slice(0, 8 if present else 5)
    given = {n: z[rows] for n, z in net(x).items()}
    try:
        asked = list(net.parameters()) if rank != wrong else [torch.zeros(1)]
        lfm.learn(given, labels[rows], asked, present=masks)
    except RuntimeError as error:
        return str(error)
    return float(lfm.weights[1])


def test_learning_is_from_who_is_there() -> None:
    assert learnt(0, True) == pytest.approx(learnt(0, False), abs=1e-12)
    assert learnt(0, True) not in (0.5, 0.05, 0.95)


def test_ranks_learn_the_mean_and_share_an_error() -> None:
    first, second = ranks(2).run(learnt, True)
    alone = [learnt(rank, True) for rank in range(2)]
    assert first == second == pytest.approx(sum(map(float, alone)) / 2)
    assert alone[0] != alone[1]
    for text in ranks(2).run(learnt, True, 1):
        assert isinstance(text, str)


def learnt_sharded(rank: int) -> str:
    net, lfm = Net(), mmfuse.LFM(weighting="learned", rate=20.0)
    for each in (*net.nets.values(), net):
        fully_shard(each, mesh=init_device_mesh("cpu", (2,)))
    lfm.set_epoch(0)
    before, labels = lfm.weights.clone(), torch.arange(8) % 3
    given = net({n: torch.randn(8, 3).double() for n in net.nets})
    parameters = [p for each in net.nets.values() for p in each.parameters()]
    try:
        lfm.learn(given, labels, parameters)
    except TypeError as error:
        assert torch.equal(lfm.weights, before)
        return str(error)
    return ""


def test_parameters_that_are_sharded_are_refused() -> None:
    """A loss has no gradient of them, and the weights would stay what they are, in silence."""
    for text in ranks(2).run(learnt_sharded):
        assert text.startswith("LFM.learn: parameters are sharded (DTensors)")


@pytest.mark.parametrize(("change", "error", "text"), bad_masks(ROWS))
def test_bad_masks(change: dict[str, Tensor], error: type[Exception], text: str) -> None:
    logits, labels = batch(2, 0)
    with pytest.raises(error, match=text):
        mmfuse.LFM()(logits, labels, present={**some(2, ROWS, 0), **change})
