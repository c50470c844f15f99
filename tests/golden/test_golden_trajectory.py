"""The replay itself must notice every difference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from trajectory import DATA, Golden, Network, Replay, difference, sgd

FILES = {path.stem for path in DATA.glob("*.npz")}


def test_every_file_is_replayed() -> None:
    """A file wants two tests."""
    assert len(FILES) > 25
    for modules in ("test_golden_*.py", "test_released_*.py"):
        tests = "".join(path.read_text() for path in DATA.parent.glob(modules))
        # The paper's equations have no release.
        left_out = {"pmr_paper"} if modules.startswith("test_released") else set()
        by_release = {"inforeg_november", "inforeg_march", "mla_first", "mla_head"}
        for name in FILES - by_release - left_out:
            assert f'"{name}"' in tests, (name, modules)
        assert all(f'"{release}"' in tests for release in ("november", "march", "first"))


def test_an_array_that_is_missing_is_an_error() -> None:
    golden = Golden("ogm_plain_concat")
    with pytest.raises(KeyError, match="has no 'scores'"):
        golden["scores"]
    with pytest.raises(KeyError, match="nothing that begins with 'noise"):
        golden.starting_with("noise.")


def plain_training(forced: bool = True) -> Replay:
    """The file's network trained without the method."""
    golden = Golden("ogm_plain_concat")
    model = Network(golden)
    run = Replay(golden, model, sgd(golden, model), forced)
    for _ in run.steps():
        inputs, labels = run.batch()
        out = model.head(torch.cat(list(model.features(inputs).values()), 1))
        F.cross_entropy(out, labels).backward()
        run.step()
    return run


def test_what_was_not_recorded_is_missed() -> None:
    with pytest.raises(AssertionError, match=r"in the file but not compared: \['applied', 'coeffi"):
        plain_training().check()
    rest = ["applied", "coefficient", "loss", "lr", "ratio", "score"]
    run = plain_training()
    run.record(more=1.0)
    with pytest.raises(AssertionError, match=r"compared but not in the file: \['more'\]"):
        run.check(hidden=rest)
    with pytest.raises(AssertionError, match="does not hold all of"):
        plain_training().check(hidden=[*rest, "weights"])


def test_training_without_the_method_is_noticed() -> None:
    """Forced, the gradients after the method show it; free, all later arrays do."""
    rest = ["applied", "coefficient", "loss", "lr", "ratio", "score"]
    conv = [f"grad_after.{m}.{c}.weight" for m in ("audio", "visual") for c in ("c1", "c2")]
    with pytest.raises(AssertionError) as noticed:
        plain_training().check(hidden=rest)
    wrong = [line.split(":")[0] for line in str(noticed.value).splitlines() if ": step" in line]
    assert sorted(wrong) == sorted(conv)
    with pytest.raises(AssertionError, match=r"param\.head\.weight: step 1 is the first"):
        plain_training(forced=False).check(hidden=rest)


def test_a_loop_without_a_step_is_noticed() -> None:
    golden = Golden("ogm_plain_concat")
    model = Network(golden)
    run = Replay(golden, model, sgd(golden, model), forced=True)
    with pytest.raises(AssertionError, match="must call step"):
        list(run.steps())


def test_difference() -> None:
    want = torch.tensor([[4.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    assert difference(want, want) is None
    assert difference(want + 3e-9, want) is None
    off = want.clone()
    off[1, 0] += 5e-9
    assert "step 1 is the first of 1 that are off; there by 5e-09, allowed are 4e-09" in str(
        difference(off, want)
    )
    off[0, 1] = torch.nan
    assert "step 0 is the first of 2" in str(difference(off, want))
    assert difference(want[:1], want) == "shape [1, 2], the file has [2, 2]"
