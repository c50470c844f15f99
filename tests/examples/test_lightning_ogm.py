"""Lightning's example: a strength of 0 is plain training."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning")

import lightning_ogm as example
from demonstrations.data import Part, Split


class AskedError(Exception):
    """Ends the example where it makes its callback."""


@pytest.mark.parametrize(("alpha", "noise"), [("0", False), ("0.8", True)])
def test_no_strength_is_no_noise(monkeypatch: pytest.MonkeyPatch, alpha: str, noise: bool) -> None:
    asked: list[dict[str, object]] = []

    def balance(*_: object, **options: object) -> None:
        asked.append(options)
        raise AskedError

    part = Part({view: torch.zeros(2, 3) for view in example.VIEWS}, torch.zeros(2).long())
    monkeypatch.setattr(example, "load", lambda views: None)
    monkeypatch.setattr(example, "split", lambda *_, **__: Split(part, part, part))
    monkeypatch.setattr(example, "Balance", balance)
    with pytest.raises(AskedError):
        example.main(["--alpha", alpha])
    assert asked[0]["alpha"] == float(alpha) and asked[0]["noise"] is noise


def test_epochs_are_at_least_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])
    assert "argument --epochs: must be at least 1, got 0" in capsys.readouterr().err
