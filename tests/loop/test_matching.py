"""Encoders by name: modules, globs, the prefixes of wrappers, and names that match nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from networks import AudioVisual, batch
from ranks import ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mmfuse
from mmfuse.loop.matching import match_parameters


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, which DistributedDataParallel needs."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def names(model: nn.Module, found: object) -> list[str]:
    """The found parameters, by their names in `model`."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    assert isinstance(found, list)
    return [by_id[id(p)] for p in found]


def test_a_name_stands_for_the_module() -> None:
    model = AudioVisual()
    for pattern in ("audio_net", ["audio_net"]):
        found = match_parameters(model, {"audio": pattern, "visual": "visual_net"})
        assert found["audio"] is model.audio_net
        assert found["visual"] is model.visual_net
    assert list(found) == ["audio", "visual"]


def test_patterns_come_in_the_models_order_without_duplicates() -> None:
    model = AudioVisual()
    asked = {
        "audio": ["audio_net.proj", "audio_net.conv*.weight", "audio_net.conv1", "audio_net.*1.b*"],
        "visual": "visual_net.conv?.*",
        "bias": "fc.bias",
    }
    found = match_parameters(model, asked)
    assert names(model, found["audio"]) == [
        "audio_net.conv1.weight",
        "audio_net.bn1.bias",
        "audio_net.conv2.weight",
        "audio_net.proj.weight",
        "audio_net.proj.bias",
    ]
    assert names(model, found["visual"]) == [
        "visual_net.conv1.weight",
        "visual_net.conv2.weight",
        "visual_net.conv2.bias",
    ]
    assert names(model, found["bias"]) == ["fc.bias"]


def test_globs_see_upper_case() -> None:
    model = nn.ModuleDict({"A": nn.Linear(1, 1), "a": nn.Linear(1, 1)})
    found = match_parameters(model, {"A": "A*", "a": "[a]*"})
    assert names(model, found["A"]) == ["A.weight", "A.bias"]
    assert names(model, found["a"]) == ["a.weight", "a.bias"]


def test_tied_weights_are_found_under_each_of_their_names_and_once() -> None:
    model = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)})
    model["y"].weight = model["x"].weight
    assert match_parameters(model, {"m": "y.weight"})["m"] == [model["x"].weight]
    found = match_parameters(model, {"m": ["y.*", "x.*"]})
    assert names(model, found["m"]) == ["x.weight", "x.bias", "y.bias"]


def test_what_is_an_encoder_already_is_passed_through() -> None:
    model = AudioVisual()
    other = nn.Linear(1, 1)
    generator = (p for p in model.audio_net.parameters())
    found = match_parameters(model, {"audio": generator, "other": other, "visual": "visual_net"})
    assert [id(p) for p in found["audio"]] == [id(p) for p in model.audio_net.parameters()]
    assert found["other"] is other
    assert found["visual"] is model.visual_net


def test_the_methods_take_what_was_found() -> None:
    model = AudioVisual()
    found = match_parameters(model, {"audio": ["audio_net.conv?.*"], "visual": "visual_net"})
    ogm = mmfuse.OGM(found, noise=False)
    audio, visual, labels = batch()
    a, v, out = model(audio, visual)
    logits = mmfuse.unimodal_logits(model.fc, {"audio": a, "visual": v})
    plain = torch.autograd.grad(out.sum(), list(model.parameters()), retain_graph=True)
    result = ogm.backward(out.sum(), logits, labels)
    k = dict(zip(found, result.coefficients, strict=True))
    assert min(k.values()) < 1.0
    for (name, p), g in zip(model.named_parameters(), plain, strict=True):
        modulated = name.startswith(("visual_net", "audio_net.conv"))
        assert torch.equal(p.grad, g * k[name.split("_")[0]] if modulated else g), name
    with pytest.raises(ValueError, match="a parameter can belong to one modality only"):
        mmfuse.OGM(match_parameters(model, {"audio": "audio_net", "both": "*_net.conv1.*"}))


def test_compiled_models() -> None:
    model = AudioVisual()
    compiled = torch.compile(model, backend="eager")
    for pattern in ("audio_net", "_orig_mod.audio_net"):
        for seen in (compiled, model):
            assert match_parameters(seen, {"audio": pattern})["audio"] is model.audio_net
    glob = match_parameters(compiled, {"m": "_orig_mod.audio_net.conv?.weight"})["m"]
    assert names(model, glob) == ["audio_net.conv1.weight", "audio_net.conv2.weight"]


def test_a_wrapped_encoder_is_the_wrapper_which_is_what_must_be_called() -> None:
    model = AudioVisual()
    inner = model.audio_net
    model.audio_net = torch.compile(inner, backend="eager")
    model.visual_net.conv1 = checkpoint_wrapper(model.visual_net.conv1)
    found = match_parameters(model, {"a": "audio_net", "v": "visual_net.conv1"})
    assert found["a"] is model.audio_net is not inner
    assert found["v"] is model.visual_net.conv1
    assert match_parameters(model, {"a": "audio_net._orig_mod"})["a"] is inner
    weights = match_parameters(model, {"m": ["audio_net.conv1.weight", "visual_net.conv1.weight"]})
    assert weights["m"] == [
        inner.conv1.weight,
        model.visual_net.conv1._checkpoint_wrapped_module.weight,
    ]


@pytest.mark.usefixtures("_one_rank")
def test_distributed_data_parallel() -> None:
    model = AudioVisual()
    ddp = nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
    for pattern in ("audio_net", "module.audio_net", "module._orig_mod.audio_net"):
        for seen in (ddp, model):
            assert match_parameters(seen, {"audio": pattern})["audio"] is model.audio_net
    for pattern in ("audio_net.conv?.w*", "module.audio_net.conv?.w*"):
        found = match_parameters(ddp, {"audio": pattern})["audio"]
        assert names(model, found) == ["audio_net.conv1.weight", "audio_net.conv2.weight"]


class Holder(nn.Module):
    """A network that calls a part of its own "module"."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.usefixtures("_one_rank")
def test_a_part_that_is_called_module() -> None:
    model = Holder()
    ddp = nn.parallel.DistributedDataParallel(model)
    for seen in (model, ddp):
        assert match_parameters(seen, {"m": "module"})["m"] is model.module
        assert match_parameters(seen, {"m": "module.weight"})["m"] == [model.module.weight]
        assert match_parameters(seen, {"m": "module.w*"})["m"] == [model.module.weight]
        assert match_parameters(seen, {"m": "weight"})["m"] == [model.weight]
    assert match_parameters(ddp, {"m": "module.module"})["m"] is model.module


def _sharded(rank: int) -> list[str]:
    """The names that patterns find in a model wrapped by FSDP2, and that they are its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = AudioVisual()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    found = match_parameters(model, {"a": "audio_net.conv?.weight", "v": "visual_net"})
    assert found["v"] is model.visual_net
    return names(model, found["a"])


def test_fully_sharded() -> None:
    for found in ranks(2).run(_sharded):
        assert found == ["audio_net.conv1.weight", "audio_net.conv2.weight"]


def test_all_that_matches_nothing_is_named_with_what_is_next_to_it() -> None:
    model = AudioVisual()
    asked = {
        "audio": "audio_nt",
        "visual": ["visual_net", "visual_net.cnv1", "xyz"],
        "glob": ["fc.w*", "audio_net.con*.weights", "visual_net.conv?"],
    }
    with pytest.raises(ValueError, match="encoders") as error:
        match_parameters(model, asked)
    lines = str(error.value).splitlines()
    assert [line.split(" ")[0] + " " + line.split(" ")[1] for line in lines] == [
        "encoders['audio']: 'audio_nt'",
        "encoders['visual']: 'visual_net.cnv1'",
        "encoders['visual']: 'xyz'",
        "encoders['glob']: 'audio_net.con*.weights'",
        "encoders['glob']: 'visual_net.conv?'",
    ]
    assert "is no module or parameter of AudioVisual; did you mean 'audio_net' or" in lines[0]
    assert "'visual_net.conv1'" in lines[1]
    assert lines[2] == "encoders['visual']: 'xyz' is no module or parameter of AudioVisual"
    assert "'audio_net.conv2.weight'" in lines[3]
    assert "matches no parameter of AudioVisual; did you mean" in lines[3]
    assert lines[4].endswith("whose names a glob is for; try 'visual_net.conv?.*'")
    assert all(line.count(" or '") <= 2 for line in lines)


def test_a_module_without_parameters_is_no_encoder() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="'0' is a module of Sequential without parameters"):
        match_parameters(model, {"m": "0"})


def test_wrong_kinds() -> None:
    model = AudioVisual()
    with pytest.raises(TypeError, match="model must be a module, got dict"):
        match_parameters({}, {"m": "audio_net"})
    with pytest.raises(TypeError, match="encoders must map names to patterns, got list"):
        match_parameters(model, ["audio_net"])
    for value in (3, model.fc.weight, {"audio_net": 1}, b"audio_net", None):
        with pytest.raises(TypeError, match=r"encoders\['m'\] must be a module, an iterable of"):
            match_parameters(model, {"m": value})
    with pytest.raises(TypeError, match=r"encoders\['m'\]\[1\] is neither a parameter nor .* int"):
        match_parameters(model, {"m": ["audio_net", 3]})
    with pytest.raises(TypeError, match=r"encoders\['m'\] mixes parameters and patterns"):
        match_parameters(model, {"m": ["audio_net", model.fc.weight]})
