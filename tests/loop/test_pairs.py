"""Samples without some of the modalities: `present=`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from balancing import COMPARING, STEPPING, acted, make
from linear import CLASSES, ROWS, Networks, everyone, masks
from ranks import ranks
from torch import Tensor, nn

import mmfuse
from mmfuse.loop.given import pair_scores
from mmfuse.loop.pairs import mean_ratio, own
from mmfuse.methods._redreg_rule import Seen


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("kind", STEPPING)
def test_with_all_present_nothing_changes(kind: str, modalities: int) -> None:
    found = []
    for present in (None, everyone(modalities)):
        nets = Networks(modalities)
        method = (
            nets.method(kind, stream=mmfuse.NoiseStream(1)) if _draws(kind) else nets.method(kind)
        )
        nets.backward()
        more = {} if present is None else {"present": present}
        out = method.step(**nets.given(method), **more)
        grads = [p.grad for e in nets.encoders.values() for p in e.parameters()]
        found.append([out.coefficients.double(), out.scores.double(), *grads])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert acted(method, [out])


def _draws(kind: str) -> bool:
    return bool(make(kind, Networks(2).encoders).rule.need.stream)


@pytest.mark.parametrize("kind", STEPPING)
def test_a_pair_is_compared_over_the_samples_that_have_both(kind: str) -> None:
    """Other samples may hold anything, even NaN, which encoders may return for empty inputs."""
    nets, other = Networks(2), Networks(2)
    present = masks(2, 0.3)
    both = present["audio"] & present["visual"]
    assert 0 < int(both.sum()) < ROWS
    for name, mask in present.items():
        nets.logits[name][~mask] = torch.nan
        nets.inputs[name][~mask] = 0.0
    results = []
    for net, rows, more in ((nets, slice(None), {"present": present}), (other, both, {})):
        method = net.method(kind)
        net.backward()
        results.append(method.step(**net.given(method, rows), **more))
    if "inputs" in method.rule.need.inputs:  # its monitor looks at each modality's own samples
        strengths = [r.coefficients > 0 for r in results]
    else:
        strengths = [r.coefficients.double() for r in results]
    torch.testing.assert_close(*strengths, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", COMPARING)
def test_missingness_that_is_not_random_fakes_no_dominance(kind: str) -> None:
    """Equal encoders; audio is missing on the hard samples, so that its own mean is higher.

    Each gets what it gets where both have all samples.
    """
    nets = Networks(2)
    nets.logits["visual"] = nets.logits["audio"] = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    easy = nets.logits["audio"].softmax(1)[torch.arange(ROWS), nets.labels] > 0.2
    present = {"audio": easy, "visual": torch.ones(ROWS, dtype=torch.bool)}
    found = []
    for shown in (everyone(2), present):
        method = nets.method(kind)
        nets.backward()
        out = method.step(**nets.given(method), present=shown)
        found.append(out.coefficients.double())
    torch.testing.assert_close(*found, rtol=0, atol=1e-7 if method.rule.need.accuracy else 1e-12)
    if not method.rule.need.accuracy:  # which is of progress, and both progress
        neutral = torch.full((2,), method.rule.need.neutral, dtype=torch.float64)
        torch.testing.assert_close(found[1], neutral, rtol=0, atol=1e-12)
    assert out.scores[0] > out.scores[1] + 1e-3  # the naive comparison would see one ahead


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("kind", COMPARING)
def test_one_that_is_missing_from_the_batch_is_left_alone(kind: str, modalities: int) -> None:
    nets = Networks(modalities)
    method = nets.method(kind)
    present = {**everyone(modalities), "visual": torch.zeros(ROWS, dtype=torch.bool)}
    nets.logits["visual"][:] = torch.nan
    nets.backward(without=("visual",))
    out = method.step(**nets.given(method), present=present)
    assert out.coefficients[1] == method.rule.need.neutral
    assert bool(out.coefficients.isfinite().all()) and bool(out.finite)
    assert all(bool(p.grad.isfinite().all()) for p in nets.encoders["audio"].parameters())
    if modalities == 2:  # there is nobody to compare with
        assert out.coefficients[0] == method.rule.need.neutral
    else:  # as if it had never been there
        two = Networks(modalities)
        pair = mmfuse_pair(kind, two)
        want = pair.step(**{k: _without(v, "visual") for k, v in two.given(method).items()})
        torch.testing.assert_close(out.coefficients[[0, 2]].double(), want.coefficients.double())


def mmfuse_pair(kind: str, nets: Networks) -> Any:
    del nets.encoders["visual"]
    made = nets.method(kind)
    nets.backward()
    nets.encoders["visual"] = nn.Linear(3, 5, dtype=torch.float64)
    return made


def _without(values: Any, name: str) -> Any:
    return {n: v for n, v in values.items() if n != name} if isinstance(values, dict) else values


def test_no_gradient_is_an_error_again_once_samples_have_the_modality() -> None:
    nets = Networks(2)
    method = nets.method("OGM")
    gone = {**everyone(2), "visual": torch.zeros(ROWS, dtype=torch.bool)}
    for _ in range(2):
        nets.backward(without=("visual",))
        method.step(**nets.given(method), present=gone)
    for more in ({"present": everyone(2)}, {}):
        nets.backward(without=("visual",))
        with pytest.raises(RuntimeError, match="'visual' has a gradient"):
            method.step(**nets.given(method), **more)


@pytest.mark.parametrize("options", [{}, {"criterion": nn.CrossEntropyLoss()}])
def test_what_a_failed_step_was_given_is_forgotten(options: dict[str, Any]) -> None:
    nets = Networks(2)
    method = nets.method("OGM", **options)
    gone = {**everyone(2), "visual": torch.zeros(ROWS, dtype=torch.bool)}
    nets.backward(without=("audio", "visual"))
    with pytest.raises(RuntimeError, match="'audio' has a gradient"):
        method.step(**nets.given(method), present=gone)
    nets.backward(without=("visual",))
    with pytest.raises(RuntimeError, match="'visual' has a gradient"):
        method.step(**nets.given(method))


@pytest.mark.parametrize("kind", STEPPING)
def test_histories_do_not_know_of_a_step_without_the_modality(kind: str) -> None:
    """Steps 1 and 3 alone leave the same state of the missing one as steps 1 to 3."""
    states = []
    for middle in (True, False):
        nets = Networks(3)
        method = nets.method(kind)
        for present in (everyone(3), {**everyone(3), "text": ~everyone(3)["text"]}, everyone(3)):
            if not middle and not bool(present["text"].any()):
                continue
            nets.backward(without=() if bool(present["text"].any()) else ("text",))
            method.step(**nets.given(method), present=present)
        states.append({k: v[2] for k, v in method._state.items() if v.dim() and len(v) == 3})
    # Two monitors of one step differ by their noise, which the stream draws anew.
    for noisy in ("redundancy", "average"):
        for state in states:
            state.pop(noisy, None)
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("kind", STEPPING)
def test_micro_batches_are_weighed_by_the_samples_that_pairs_share(kind: str) -> None:
    found = []
    present = masks(3, 0.3)
    present["visual"][:10] = False  # none of the first micro-batch
    for parts in ([slice(None)], [slice(0, 10), slice(10, ROWS)]):
        nets = Networks(3)
        method = nets.method(kind)
        nets.backward()
        for part in parts[:-1]:
            shown = {n: m[part] for n, m in present.items()}
            method.observe(**nets.given(method, part), present=shown)
        shown = {n: m[parts[-1]] for n, m in present.items()}
        out = method.step(**nets.given(method, parts[-1]), present=shown)
        found.append([out.coefficients.double(), out.scores.double()])
    monitors = "inputs" in method.rule.need.inputs  # other noise for other rows
    tolerance = 2e-1 if monitors else 1e-10
    torch.testing.assert_close(*found, rtol=tolerance, atol=1e-10)


def one_of_two(rank: int, kind: str, present: dict[str, Tensor]) -> list[Tensor]:
    nets = Networks(2)
    method = nets.method(kind)
    nets.backward()
    mine = slice(0, 9) if rank == 0 else slice(9, ROWS)
    shown = {n: m[mine] for n, m in present.items()}
    out = method.step(**nets.given(method, mine), present=shown)
    return [out.coefficients.double(), out.scores.double()]


@pytest.mark.parametrize("kind", [k for k in STEPPING if k != "RedReg"])
def test_ranks_with_other_samples_missing_decide_as_one_process(kind: str) -> None:
    present = masks(2, 0.3)
    present["audio"][:9] = False  # none of the first rank's
    first, second = ranks(2).run(one_of_two, kind, present)
    nets = Networks(2)
    method = nets.method(kind)
    nets.backward()
    out = method.step(**nets.given(method), present=present)
    want = [out.coefficients.double(), out.scores.double()]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, want, rtol=1e-10, atol=1e-10)


def test_it_is_given_in_every_micro_batch_or_in_none() -> None:
    nets = Networks(2)
    method = nets.method("OGM")
    method.observe(**nets.given(method))
    with pytest.raises(TypeError, match="all of a step"):
        method.observe(**nets.given(method), present=everyone(2))


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no bool": ({"audio": torch.ones(ROWS)}, TypeError, r"present\['audio'\] must be a bool"),
    "no tensor": ({"audio": [True] * ROWS}, TypeError, r"present\['audio'\] must be a bool"),
    "length": (
        {"audio": torch.ones(ROWS - 1, dtype=torch.bool)},
        ValueError,
        r"present\['audio'\] must have shape \[24\], got \[23\]",
    ),
    "names": ({"sound": torch.ones(ROWS, dtype=torch.bool)}, ValueError, "unknown"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_are_named_before_anything_changes(name: str) -> None:
    wrong, error, message = WRONG[name]
    nets = Networks(2)
    method = nets.method("OGM")
    nets.backward()
    with pytest.raises(error, match=message):
        method.step(**nets.given(method), present={**everyone(2), **wrong})
    assert all(bool((p.grad == 1).all()) for e in nets.encoders.values() for p in e.parameters())


def test_tables_are_means_over_shared_samples() -> None:
    prob = torch.tensor([[0.2, 0.4, 0.9], [0.5, torch.nan, 0.1]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    weight = torch.tensor([1.0, 1.0, 3.0])
    scores = mmfuse.ops.SampleScores(prob, torch.full_like(prob, -torch.inf), weight)
    found = pair_scores(scores, mask)
    want = [[(0.2 + 0.4 + 2.7) / 5, (0.2 + 2.7) / 4], [(0.5 + 0.3) / 4] * 2]
    table = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(found.prob.view(2, 2), table, rtol=1e-6, atol=0)
    assert found.count.tolist() == [5, 4, 4, 4]
    assert bool((found.log_prob == -torch.inf).all())
    torch.testing.assert_close(own(table), torch.tensor([want[0][0], want[1][1]]).double())
    ratio = want[0][1] / want[1][0]
    torch.testing.assert_close(mean_ratio(table), torch.tensor([ratio, 1 / ratio]).double())


@pytest.mark.parametrize("kind", ["InfoReg", "RedReg"])
def test_a_history_counts_the_steps_of_each_modality(kind: str) -> None:
    nets = Networks(3)
    method = nets.method(kind)
    gone = {**everyone(3), "text": torch.zeros(ROWS, dtype=torch.bool)}
    for present in (everyone(3), gone, gone):
        nets.backward(without=() if bool(present["text"].any()) else ("text",))
        method.step(**nets.given(method), present=present)
    assert method._state["steps"].tolist() == [3, 3, 1]


def test_a_modality_of_one_micro_batch_alone_needs_a_gradient() -> None:
    nets = Networks(2)
    method = nets.method("OGM")
    gone = {**everyone(2), "visual": torch.zeros(ROWS, dtype=torch.bool)}
    nets.backward(without=("visual",))
    method.observe(**nets.given(method), present=everyone(2))
    with pytest.raises(RuntimeError, match="'visual' has a gradient"):
        method.step(**nets.given(method), present=gone)


class OtherEachTime:
    """Noise that is the same for the same rows, and differs from call to call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.sin(7 * x + self.calls)


def test_the_redundancy_is_that_of_the_samples_that_are_there() -> None:
    present = masks(2, 0.4)
    nets = Networks(2)
    method = nets.method("RedReg", noise=OtherEachTime())
    nets.backward()
    found = method.step(**nets.given(method), present=present).redundancy
    for m, name in enumerate(nets.names):
        other = Networks(2)
        alone = other.method("RedReg", noise=OtherEachTime())
        other.backward()
        want = alone.step(**other.given(alone, present[name])).redundancy
        # 1e-12 is added to mean squares of 1e-3 over all rows and over those that are there.
        torch.testing.assert_close(found[m], want[m], rtol=1e-7, atol=0)
        whole = Networks(2)
        every = whole.method("RedReg", noise=OtherEachTime())
        whole.backward()
        assert abs(every.step(**whole.given(every)).redundancy[m] - want[m]) > 1e-6 * want[m]


def test_the_gate_is_that_of_the_samples_that_have_both() -> None:
    """The mean cosine over shared samples is 0.6; over all, with zeros for the others, 0.3."""
    a = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    b = torch.tensor([[0.6, 0.8]] * 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    seen = Seen([a, b], None, present=mask)
    for threshold, above in ((0.55, True), (0.65, False)):
        found = seen.above(torch.tensor(threshold, dtype=torch.float64))
        assert bool(found > 0) == above


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("modalities", [2, 3])
def test_the_gate_of_equal_encoders_is_open_whoever_is_missing(modalities: int, parts: int) -> None:
    """Their features are alike; over all samples their mean cosine would be below 0.9."""
    nets = Networks(modalities)
    method = nets.method("RedReg", agreement=(0.9, 0.9))
    for name in nets.names:
        nets.encoders[name].load_state_dict(nets.encoders["audio"].state_dict())
        nets.inputs[name] = nets.inputs["audio"]
        nets.logits[name] = nets.logits["audio"].clone()
    rows = torch.arange(ROWS)
    p = nets.logits["audio"].softmax(1)[rows, nets.labels]
    present = {**everyone(modalities), "audio": p > p.quantile(0.3)}  # not the hard samples
    nets.logits["audio"][rows, nets.labels] += 0.5  # a little ahead, for the gate to act on
    nets.inputs["audio"][~present["audio"]] = torch.nan
    for name in nets.names[1:]:
        nets.inputs[name] = nets.inputs[name].nan_to_num(0.5)
    nets.backward()
    cut = ROWS // parts
    for start in range(0, ROWS - cut, cut):
        part = slice(start, start + cut)
        shown = {n: m[part] for n, m in present.items()}
        method.observe(**nets.given(method, part), present=shown)
    last = slice(ROWS - cut, ROWS)
    given = nets.given(method, last)
    out = method.step(**given, present={n: m[last] for n, m in present.items()})
    assert out.gate == 1 and out.coefficients[0] > 0
    strict = nets.method("RedReg", agreement=(0.9, 0.9))
    nets.backward()
    filled = {
        k: {n: x.nan_to_num(0.0) for n, x in v.items()} for k, v in given.items() if k != "labels"
    }
    assert strict.step(labels=given["labels"], **filled).gate == 0, "without masks it is shut"
