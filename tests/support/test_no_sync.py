"""The search for waits leaves nothing behind; PyTorch's debug mode is played where it has none."""

from __future__ import annotations

import warnings

import pytest
import torch
from no_sync import no_host_sync

OTHER = "Something else that PyTorch has to say"


class SyncDebugMode:
    """Acts as torch.cuda does: the mode is set first, then the first call of a process warns."""

    def __init__(self, message: str) -> None:
        self.mode = 0
        self.said = False
        self.message = message

    def get(self) -> int:
        return self.mode

    def set(self, mode: int | str) -> None:
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
        if not self.said:
            self.said = True
            warnings.warn(self.message, stacklevel=2)


@pytest.fixture
def debug_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SyncDebugMode:
    played = SyncDebugMode(
        getattr(
            request,
            "param",
            "Synchronization debug mode is a prototype feature and does not yet detect all "
            "synchronizing operations (a C++ file and a line)",
        )
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", played.get)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", played.set)
    return played


@pytest.mark.parametrize("before", [0, 1])
def test_the_mode_is_put_back(debug_mode: SyncDebugMode, before: int) -> None:
    debug_mode.mode = before
    for _ in range(2):
        with no_host_sync("cuda"):
            assert debug_mode.mode == 2
        assert debug_mode.mode == before
    assert debug_mode.said


def test_the_mode_is_put_back_after_a_failure(debug_mode: SyncDebugMode) -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense reads"), no_host_sync("cuda"):
        torch.ones(()).item()
    assert debug_mode.mode == 0


@pytest.mark.parametrize("debug_mode", [OTHER], indirect=True)
def test_no_other_warning_is_hidden(debug_mode: SyncDebugMode) -> None:
    with pytest.raises(UserWarning, match=OTHER), no_host_sync("cuda"):
        pass
    assert debug_mode.mode == 0


def test_warnings_of_the_block_are_not_hidden(debug_mode: SyncDebugMode) -> None:
    message = "Synchronization debug mode is a prototype"
    with pytest.raises(UserWarning, match=message), no_host_sync("cuda"):
        warnings.warn(message, stacklevel=1)
    assert debug_mode.mode == 0
