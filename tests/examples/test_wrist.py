"""The wrist movements: people stay apart, windows are cut right, bad files get an error."""

from __future__ import annotations

import importlib.metadata
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from demonstrations import wrist_data as wrist
from demonstrations.data import DataError, installed, read_pickle


def people(count: int = 10) -> wrist.Recordings:
    """Every person does every exercise in two windows; the first number names the person."""
    every = torch.arange(count).repeat_interleave(2 * len(wrist.CLASSES))
    labels = torch.arange(len(wrist.CLASSES)).repeat(2 * count)
    views = {view: every.float().view(-1, 1, 1).expand(-1, 3, wrist.WINDOW) for view in wrist.VIEWS}
    return wrist.Recordings(views, labels, every)


def test_no_person_is_in_two_parts_and_everyone_is_tested_equally_often() -> None:
    data = people()
    tested: list[int] = []
    for seed in range(10):
        split = wrist.split(data, seed)
        # Standardising keeps persons apart: one value for each.
        values = [set(part.views["gyroscope"].flatten().tolist()) for part in split]
        assert [len(v) for v in values] == [6, 2, 2]
        assert len(set().union(*values)) == 10
        order = sorted(set().union(*values))
        tested += [order.index(v) for v in values[2]]
    assert sorted(tested) == sorted([*range(10)] * 2)


def test_a_seed_repeats_its_split_and_the_training_samples_are_standard() -> None:
    data = people()
    one, again, other = (wrist.split(data, seed) for seed in (3, 3, 4))
    assert torch.equal(one.test.views["gyroscope"], again.test.views["gyroscope"])
    assert not torch.equal(one.test.views["gyroscope"], other.test.views["gyroscope"])
    std, mean = torch.std_mean(one.train.views["accelerometer"], dim=(0, 2))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-3, rtol=0)


def test_windows_do_not_overlap_and_keep_who_and_what() -> None:
    first = np.arange(6 * 250, dtype=np.float32).reshape(250, 6)
    cut = wrist.windows([first, first[:120]], np.array([4, 2]), np.array([7, 9]))
    assert cut.labels.tolist() == [4, 4, 2] and cut.people.tolist() == [7, 7, 9]
    assert cut.views["accelerometer"].shape == (3, 3, wrist.WINDOW)
    again = torch.cat([cut.views["accelerometer"][:2], cut.views["gyroscope"][:2]], 1)
    assert again.transpose(1, 2).reshape(-1, 6).tolist() == first[:200].tolist()


@pytest.mark.parametrize("bad", [np.zeros((200, 5)), np.full((200, 6), np.nan), np.zeros(200)])
def test_a_recording_of_another_form_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\[samples, 6\] and finite"):
        wrist.windows([bad.astype(np.float32)], np.array([0]), np.array([0]))


def test_a_class_without_samples_is_said() -> None:
    data = people()
    rows = (data.labels != 2) | (data.people > 5)
    few = wrist.Recordings(
        {view: x[rows] for view, x in data.views.items()}, data.labels[rows], data.people[rows]
    )
    errors = []
    for seed in range(5):
        try:
            wrist.split(few, seed)
        except DataError as error:
            errors.append(str(error))
    assert errors and all("'FEL' has no " in error for error in errors)


class Malicious:
    """A pickle of it runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "owned"
    content = pickle.dumps({"X": Malicious(mark)}, protocol)
    with pytest.raises(DataError, match=r"holds more than arrays .*system.*install the package"):
        read_pickle(io.BytesIO(content), "file.npy", "pip install x")
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # so the pickle was dangerous


def test_arrays_of_both_pythons_are_read() -> None:
    content = {"X": [np.arange(3.0)], "names": ["a"], "o": np.array([1, "b"], object)}
    found = read_pickle(io.BytesIO(pickle.dumps(content, 2)), "x", "y")
    assert found["X"][0].tolist() == [0.0, 1.0, 2.0] and found["o"].tolist() == [1, "b"]
    other = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    with pytest.raises(DataError, match="rot13"):
        read_pickle(io.BytesIO(other), "x", "y")


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"not a pickle", b"\x80\x04N"])
def test_a_damaged_pickle_is_said(content: bytes) -> None:
    with pytest.raises(DataError, match=r"the data is damaged.* pip install z"):
        read_pickle(io.BytesIO(content), "the data", "pip install z")


def test_a_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(DataError, match="no-such-package is not installed; install it with: pip"):
        installed("no-such-package", "file", "pip install it")


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that the package seems to carry."""
    path = tmp_path / wrist.FILE
    entry = SimpleNamespace(name=wrist.FILE, locate=lambda: path)
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: SimpleNamespace(files=[entry])
    )
    return path


def test_a_file_of_another_version_is_said(carried: Path) -> None:
    with pytest.raises(DataError, match="is not installed"):
        wrist.load()
    carried.write_bytes(b"nothing")
    with pytest.raises(DataError, match="is no NumPy file"):
        wrist.load()
    np.save(carried, np.array({"X": [], "y": []}, object), allow_pickle=True)
    with pytest.raises(DataError, match="does not hold the 140 recordings"):
        wrist.load()


def test_the_real_recordings() -> None:
    try:
        data = wrist.load()
    except DataError as error:
        pytest.skip(str(error))
    assert len(data.people.unique()) == 10
    assert data.views["gyroscope"].shape == (len(data.labels), 3, wrist.WINDOW)
    assert data.labels.bincount().min() > 100
    split = wrist.split(data, 0)
    assert min(len(part.labels) for part in split) > 200
