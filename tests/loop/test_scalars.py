"""Scalars of every step arrive in TensorBoard, and nothing waits for them before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from balancing import ON_GRADIENTS, balance, make, see, show, start
from networks import AudioVisual, batch
from no_sync import no_host_sync
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import mmfuse
from mmfuse.loop.scalars import ScalarLog, scalars_of

NAMES = ("audio", "visual")


class Written(list[tuple[int, dict[str, float]]]):
    """Keeps what it is called with."""

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        self.append((step, scalars))


def train(steps: int, log: ScalarLog) -> list[mmfuse.OGMResult]:
    model = AudioVisual()
    ogm = mmfuse.OGM(model.encoders)
    results = []
    for step in range(steps):
        model.zero_grad()
        audio, visual, labels = batch()
        a, v, out = model(audio, visual)
        logits = mmfuse.unimodal_logits(model.fc, {"audio": a, "visual": v})
        nn.functional.cross_entropy(out, labels).backward()
        results.append(ogm.step(logits, labels))
        log.add(step, scalars_of(results[-1], ogm.modalities.names))
    return results


@pytest.mark.parametrize("every", [1, 4, 50])
def test_tensorboard_gets_every_step(tmp_path: Path, every: int) -> None:
    with SummaryWriter(tmp_path) as writer, ScalarLog(writer, every) as log:
        results = train(10, log)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = {f"{f}/{n}" for f in ("coefficients", "scores", "ratios") for n in NAMES} | {"finite"}
    assert set(events.Tags()["scalars"]) == tags
    for field in ("coefficients", "scores", "ratios"):
        for m, name in enumerate(NAMES):
            found = events.Scalars(f"{field}/{name}")
            assert [e.step for e in found] == list(range(10))
            assert [e.value for e in found] == [getattr(r, field)[m].item() for r in results]
    assert [e.value for e in events.Scalars("finite")] == [1.0] * 10


def test_nothing_is_written_before_the_buffer_is_full() -> None:
    written = Written()
    log = ScalarLog(written, every=4)
    for step in range(11):
        log.add(10 * step, {"a": torch.tensor(step), "b": -step})
        if not torch.cuda.is_available():
            assert len(written) == 4 * ((step + 1) // 4)
    assert [step for step, _ in written] == [0, 10, 20, 30, 40, 50, 60, 70]
    assert repr(log).startswith("ScalarLog(every=4, 2 tags, ")
    log.flush()
    assert repr(log) == "ScalarLog(every=4, 2 tags, 0 steps to be written)"
    expected = [(10 * step, {"a": float(step), "b": float(-step)}) for step in range(11)]
    assert written == expected
    log.flush()
    assert written == expected
    log.add(110, {"a": torch.tensor(11), "b": -11})
    log.close()
    assert written == [*expected, (110, {"a": 11.0, "b": -11.0})]
    log.close()
    assert repr(log).endswith(", closed)")
    with pytest.raises(RuntimeError, match="the log is closed"):
        log.add(120, {"a": torch.tensor(12), "b": -12})
    assert len(written) == 12


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_is_read_between_two_flushes(device: str) -> None:
    written = Written()
    log = ScalarLog(written, every=8)
    rows = torch.randn(40, 3, device=device)
    for step in range(2):  # the buffers are made
        log.add(step, {"a": rows[step, 0], "b": rows[step, 1:2].double()[0], "c": 0.5})
    with no_host_sync(device):
        for step in range(2, 8 if device == "cpu" else 40):
            log.add(step, {"a": rows[step, 0], "b": rows[step, 1:2].double()[0], "c": 0.5})
            if step < 7:
                assert not written
    log.close()
    columns = rows[: len(written), :2].tolist()
    assert len(written) == (8 if device == "cpu" else 40)
    assert written == [(s, {"a": a, "b": b, "c": 0.5}) for s, (a, b) in enumerate(columns)]


@pytest.mark.gpu
def test_values_on_the_host_and_on_the_device() -> None:
    written = Written()
    with ScalarLog(written, every=2) as log:
        for step in range(5):
            log.add(step, {"a": torch.tensor(float(step), device="cuda"), "b": torch.tensor(2.0)})
    assert written == [(step, {"a": float(step), "b": 2.0}) for step in range(5)]


def test_a_tensor_and_its_names() -> None:
    written = Written()
    with ScalarLog(written, every=2) as log:
        log.add(1, torch.tensor([1.0, 2.0, 3.0]), ["x", "y", "z"])
        log.add(2, torch.tensor([6, 4, 5]), ["z", "x", "y"])
        log.add(3, {"y": torch.tensor(True), "z": 9, "x": torch.tensor(7.0, requires_grad=True)})
    assert written == [
        (1, {"x": 1.0, "y": 2.0, "z": 3.0}),
        (2, {"x": 4.0, "y": 5.0, "z": 6.0}),
        (3, {"x": 7.0, "y": 1.0, "z": 9.0}),
    ]


def test_later_changes_of_a_tensor_are_not_seen() -> None:
    written = Written()
    value = torch.ones(())
    with ScalarLog(written) as log:
        for step in range(3):
            log.add(step, {"a": value})
            value.add_(1)
    assert [scalars["a"] for _, scalars in written] == [1.0, 2.0, 3.0]


def test_what_an_error_ends_is_written() -> None:
    written = Written()

    def run() -> None:
        with ScalarLog(written) as log:
            log.add(0, {"a": torch.tensor(1.0)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == [(0, {"a": 1.0})]


def test_errors_name_the_tag_and_change_nothing() -> None:
    written = Written()
    log = ScalarLog(written)
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"values\['b'\] must be 0-d, got shape \[2\]"):
        log.add(0, {"a": one, "b": torch.ones(2)})
    with pytest.raises(ValueError, match="there are no scalars"):
        log.add(0, {})
    log.add(0, {"a": one, "b": one})
    with pytest.raises(ValueError, match=r"missing \['b'\]; new \['c'\]"):
        log.add(1, {"a": one, "c": one})
    with pytest.raises(ValueError, match=r"first call; missing \['a'\]$"):
        log.add(1, {"b": one})
    with pytest.raises(ValueError, match=r"first call; new \['z'\]$"):
        log.add(1, torch.ones(3), ["a", "b", "z"])
    with pytest.raises(TypeError, match=r"values\['a'\] is no scalar but str"):
        log.add(1, {"a": "1", "b": one})
    with pytest.raises(TypeError, match=r"values\['b'\] must be real"):
        log.add(1, {"a": one, "b": torch.tensor(1j)})
    with pytest.raises(TypeError, match="needs names"):
        log.add(1, torch.ones(2))
    with pytest.raises(TypeError, match="names go with a"):
        log.add(1, {"a": one, "b": one}, ["a", "b"])
    with pytest.raises(ValueError, match=r"values must be of shape \[2\], .* got \[3\]"):
        log.add(1, torch.ones(3), ["a", "b"])
    with pytest.raises(ValueError, match="a name stands twice"):
        log.add(1, torch.ones(2), ["a", "a"])
    with pytest.raises(TypeError, match="values must be real"):
        log.add(1, torch.ones(2) * 1j, ["a", "b"])
    log.add(1, {"b": 3, "a": 2})
    log.close()
    assert written == [(0, {"a": 1.0, "b": 1.0}), (1, {"a": 2.0, "b": 3.0})]
    with pytest.raises(TypeError, match="write must be a SummaryWriter or a callable, got int"):
        ScalarLog(3)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ScalarLog(written, every=0)
    with pytest.raises(ValueError, match="every must be at most 1,000,000"):
        ScalarLog(written, every=2**31)


def features() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, nn.Linear]:
    made = {name: torch.rand(2, 8) for name in NAMES}
    head = nn.Linear(16, 3)
    return made, mmfuse.unimodal_logits(head, made), torch.tensor([0, 2]), head


def test_scalars_of_the_forward_methods() -> None:
    """Batches of 2 with 2 modalities: masks and indices could be taken for one value for each."""
    made, logits, labels, head = features()
    result = mmfuse.OPM()(made, logits, labels)
    found = scalars_of(result, NAMES)
    fields = ("drop_probability", "scores", "ratios")
    assert list(found) == [f"{field}/{name}" for field in fields for name in NAMES]
    assert found["scores/visual"].item() == result.scores[1].item()
    official = mmfuse.OPM.official(starts=0, p_exe=0.0)(made, logits, labels)
    assert len(official.rows) == 2
    assert list(scalars_of(official, NAMES)) == list(found)
    assert list(scalars_of(mmfuse.OPM().eval()(made), NAMES)) == [
        f"drop_probability/{name}" for name in NAMES
    ]

    arm = mmfuse.ARM()
    fused = (made["audio"] + made["visual"]) / 2
    weighted = arm(made, fused, logits, head(torch.cat([fused, fused], 1)), labels)
    weights = scalars_of(weighted, NAMES)
    fields = ("weights", "scores", "contributions", "nmi", "ncmi")
    assert list(weights) == [f"{field}/{name}" for field in fields for name in NAMES]
    assert weights["weights/audio"].item() == weighted.weights[0].item()


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_scalars_of_the_gradient_methods(kind: str) -> None:
    """Every field, by its own name: [M] of each modality, and 0-d."""
    model = AudioVisual()
    audio, visual, labels = batch()
    a, v = model.features(audio, visual)
    inputs = {"audio": audio, "visual": visual}
    method = make(kind, model.encoders)
    start(method)
    seen = see(model.fc, {"audio": a, "visual": v}, inputs, labels)
    result = balance(method, show(method, model.fc, seen))
    found = scalars_of(result, NAMES)
    expected = {}
    for field, value in vars(result).items():
        if field == "modalities":
            continue
        tags = [f"{field}/{name}" for name in NAMES] if value.dim() else [field]
        expected |= dict(zip(tags, value.reshape(-1).tolist(), strict=True))
    assert list(found) == list(expected)
    numbers = torch.tensor(list(expected.values()))
    torch.testing.assert_close(
        torch.stack([x.float() for x in found.values()]), numbers, rtol=0, atol=0, equal_nan=True
    )
    assert {"coefficients/audio", "coefficients/visual", "finite"} <= found.keys()


def test_scalars_of_something_else() -> None:
    made, logits, labels, _ = features()
    result = mmfuse.OPM()(made, logits, labels)
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\], but OPMResult.drop_prob.* 2 modal"):
        scalars_of(result, ["a", "b", "c"])
    with pytest.raises(TypeError, match="result must be a dataclass, got dict"):
        scalars_of({}, NAMES)
    with pytest.raises(TypeError, match="result must be a dataclass, got type"):
        scalars_of(mmfuse.OPMResult, NAMES)
