"""The state of a method that is a module: tensors alone, which every tool can save and average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from balancing import IN_FORWARD, arguments, make
from states import differences
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mmfuse
from mmfuse.loop.epochs import EpochWindowModule


class Model(nn.Module):
    def __init__(self, kind: str, seed: int = 0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(3, 2)
        self.method: EpochWindowModule = make(kind, {}, **options)

    def forward(self, x: Tensor) -> Tensor:
        """One training step of the method; the logits."""
        features = {"audio": x, "visual": x.flip(0)}
        logits = {name: self.fc(f) for name, f in features.items()}
        seen = {
            "features": features,
            "fused": x,
            "logits": logits,
            "fused_logits": self.fc(x),
            "labels": torch.arange(len(x)) % 2,
        }
        self.method(**arguments(self.method, seen))
        return logits["audio"]


def trained(kind: str, epoch: int | None = 3) -> Model:
    model = Model(kind)
    if epoch is not None:
        model.method.set_epoch(epoch)
    for _ in range(2):
        model(torch.randn(6, 3))
    return model


def safetensors(model: Model, other: Model, path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    save_file(model.state_dict(), path / "model.safetensors")
    other.load_state_dict(load_file(path / "model.safetensors"))


def torch_save(model: Model, other: Model, path: Path) -> None:
    torch.save(model.state_dict(), path / "model.pt")
    other.load_state_dict(torch.load(path / "model.pt", weights_only=True))


def pretrained(model: Model, other: Model, path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import PretrainedConfig, PreTrainedModel

    class Pretrained(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: Any, net: Model) -> None:
            super().__init__(config)
            self.net = net
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Leaves everything as it is."""

    Pretrained(PretrainedConfig(), model).save_pretrained(path)
    from safetensors.torch import load_file

    Pretrained(PretrainedConfig(), other).load_state_dict(load_file(path / "model.safetensors"))


def accelerate(model: Model, other: Model, path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerated import reset

    for net, act in ((model, "save_state"), (other, "load_state")):
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(net)
        getattr(accelerator, act)(str(path))
    reset()


SAVED: list[Callable[[Model, Model, Path], None]] = [
    safetensors,
    torch_save,
    pretrained,
    accelerate,
]


@pytest.mark.parametrize("epoch", [None, 0, 3])
@pytest.mark.parametrize("through", SAVED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", IN_FORWARD)
def test_it_is_saved_and_read_back(
    kind: str, through: Callable[..., None], epoch: int | None, tmp_path: Path
) -> None:
    model, other = trained(kind, epoch), Model(kind, seed=1)
    other.method.set_epoch(7)
    through(model, other, tmp_path)
    assert differences(dict(other.state_dict()), dict(model.state_dict())) == []
    assert (other.method.epoch, other.method._told) == (epoch or 0, epoch is not None)
    x = torch.randn(6, 3)
    for net in (model, other):
        net(x)
    assert differences(dict(other.state_dict()), dict(model.state_dict())) == []


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_all_of_it_is_tensors(kind: str) -> None:
    assert {type(value) for value in trained(kind).state_dict().values()} == {Tensor}


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_an_average_can_be_read(kind: str) -> None:
    model = trained(kind)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ema = copy.deepcopy(model.state_dict())
    for _ in range(5):
        model(torch.randn(6, 3))
        averaged.update_parameters(model)
        for mean, value in zip(ema.values(), model.state_dict().values(), strict=True):
            mean.copy_(0.9 * mean + 0.1 * value)
    for state in (ema, averaged.module.state_dict()):
        other = Model(kind, seed=1)
        other.load_state_dict(state)
        assert other.method.epoch == 3
        state["method.epoch_state"] -= 1  # as where an average is cut to an integer
        other.load_state_dict(state)
        assert other.method.epoch == 2


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_state_of_the_first_format_is_read(kind: str) -> None:
    model, other = trained(kind), Model(kind, seed=1)
    old = model.state_dict()
    del old["method.epoch_state"]
    old["method._extra_state"] = {"format": 1, "epoch": 3}
    other.load_state_dict(old)
    assert differences(dict(other.state_dict()), dict(model.state_dict())) == []
    assert other.method.epoch == 3


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_another_format_is_refused(kind: str) -> None:
    model, other = trained(kind), Model(kind, seed=1)
    before = copy.deepcopy(dict(other.method.state_dict()))
    state = model.method.state_dict()
    state["epoch_state"] = torch.tensor([7, 1])
    with pytest.raises(ValueError, match=f"the state of {kind} has format 3, but .* format 2"):
        other.method.load_state_dict(state)
    assert differences(dict(other.method.state_dict()), before) == []


def on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        made = make(kind, {})
    assert all(buffer.is_meta for buffer in made.buffers())
    return made.to_empty(device="cpu")


def emptied(kind: str) -> nn.Module:
    made = trained(kind, None).method.to_empty(device="cpu")
    made.reset_parameters()
    return made


def within_a_model_on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        made = Model(kind)
    return made.to_empty(device="cpu").method


@pytest.mark.parametrize("make_it", [on_meta, emptied, within_a_model_on_meta])
@pytest.mark.parametrize("kind", IN_FORWARD)
def test_it_begins_anew(kind: str, make_it: Callable[[str], nn.Module]) -> None:
    torch.manual_seed(0)
    made = make_it(kind)
    torch.manual_seed(0)
    assert differences(dict(made.state_dict()), dict(make(kind, {}).state_dict())) == []


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_reset_stays_in_the_epoch(kind: str) -> None:
    method = trained(kind).method
    method.reset_parameters()
    other = Model(kind, seed=1).method
    other.load_state_dict(method.state_dict())
    assert method.epoch == other.epoch == 3


def test_a_stream_on_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r'noise_state is on the meta device.*device="cpu"'):
        mmfuse.OPM(stream=mmfuse.NoiseStream(3, "meta"))
