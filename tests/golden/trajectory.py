"""Trajectories of the authors' code: reading one, and replaying it step by step.

`Replay` compares everything that a file holds: an array that a test has not recorded fails the
test, unless the test names it, with a reason, as one that mmfuse does not show. The same files are
replayed with mmfuse's `official()` and with the sequences in `released/`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import Cell
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(__file__).parent / "data"

# Relative to the largest entry of an array; the format's own promise, see data/README.md.
TOLERANCE = 1e-9

# The numbers are a CPU's; what a GPU makes of the same kernels is compared with the CPU elsewhere.
on_every_backend = pytest.mark.parametrize(
    "cell",
    [
        *(Cell(backend, "cpu") for backend in ("reference", "cpu", "cuda")),
        pytest.param(Cell("triton", "cpu"), marks=pytest.mark.slow),  # the interpreter takes long
    ],
    ids=lambda cell: cell.backend,
    indirect=True,
)
free_and_forced = pytest.mark.parametrize("forced", [True, False], ids=["forced", "free"])

# These go in; everything else comes out.
_INPUTS = (
    "x.",
    "y",
    "target",
    "init.",
    "hp.",
    "noise.",
    "u.",
    "epoch",
    "prototype_x.",
    "prototype_y",
    "validation_",
    "val_x.",
    "val_y",
    "clusters.",
)


class Golden:
    """The arrays of one file.

    Args:
        name: Of the file, without its ending.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        with np.load(DATA / f"{name}.npz") as file:
            # If a method acts within the backward pass, there is no gradient before it.
            names = {key: key.replace("grad_final.", "grad_after.") for key in file.files}
            self.arrays = {name: torch.from_numpy(file[key]) for key, name in names.items()}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.arrays:
            raise KeyError(f"{self.name}.npz has no {key!r}")
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def hp(self, name: str) -> float:
        """A hyper-parameter."""
        return self[f"hp.{name}"].item()

    def starting_with(self, prefix: str) -> dict[str, Tensor]:
        """The arrays with this prefix, without it; never none."""
        found = {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}
        if not found:
            raise KeyError(f"{self.name}.npz has nothing that begins with {prefix!r}")
        return found

    @property
    def steps(self) -> int:
        return len(self["y"])

    @property
    def results(self) -> set[str]:
        """Names of what the method has computed."""
        return {key for key in self.arrays if not key.startswith(_INPUTS)}


class ConvEncoder(nn.Module):
    """Two convolutions and a mean over positions and frames.

    Args:
        shapes: "c1.weight" and "c2.weight" → the weights.
        shift: None ends with a ReLU, a number is added in its place.
    """

    def __init__(self, shapes: dict[str, Tensor], shift: float | None = None) -> None:
        super().__init__()
        middle, channels = shapes["c1.weight"].shape[:2]
        self.c1 = nn.Conv2d(channels, middle, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(middle)
        self.c2 = nn.Conv2d(middle, len(shapes["c2.weight"]), 3, stride=2)
        self.shift = shift

    def maps(self, x: Tensor) -> Tensor:
        """The maps that are averaged: [B·frames, D, H, W]."""
        # Audio is [B, H, W]; visual [B, c, frames, H, W], whose frames join the batch.
        folded = x.unsqueeze(1) if x.dim() == 3 else x.transpose(1, 2).flatten(0, 1)
        z = self.c2(F.relu(self.bn(self.c1(folded))))
        return F.relu(z) if self.shift is None else z + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).unflatten(0, (len(x), -1)).mean(dim=(1, 3, 4))


def mlp_encoder(shapes: dict[str, Tensor], relu: bool) -> nn.Sequential:
    """Two linear layers, with batch norm if there is one; `relu` for a ReLU on the feature too."""
    first = shapes["0.weight"]
    norm = [nn.BatchNorm1d(len(first))] if "1.weight" in shapes else []
    second = shapes[f"{2 + len(norm)}.weight"]
    layers = [nn.Linear(*first.T.shape), *norm, nn.ReLU(), nn.Linear(*second.T.shape)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


class Network(nn.Module):
    """An encoder for each modality, and as many linear layers as the file begins with.

    Args:
        golden: Gives shapes and initial values.
        relu: True if features of the perceptrons end with a ReLU.
    """

    def __init__(self, golden: Golden, relu: bool = False) -> None:
        super().__init__()
        init = golden.starting_with("init.")
        shift = golden.hp("feature_shift") if "hp.feature_shift" in golden else None
        self.modalities = tuple(golden.starting_with("x."))
        for name in self.modalities:
            shapes = golden.starting_with(f"init.{name}.")
            is_conv = "c1.weight" in shapes
            made = ConvEncoder(shapes, shift) if is_conv else mlp_encoder(shapes, relu)
            self.add_module(name, made)
        for name, value in init.items():
            *above, layer, kind = name.split(".")
            if kind == "weight" and [*above, layer][0] not in self.modalities:
                has_bias = ".".join([*above, layer, "bias"]) in init
                parent: nn.Module = self
                for part in above:
                    if not hasattr(parent, part):
                        parent.add_module(part, nn.Module())
                    parent = parent.get_submodule(part)
                parent.add_module(layer, nn.Linear(*value.T.shape, bias=has_bias))
        self.double()
        # Statistics of batch norm are in a file only where evaluation mode matters.
        statistics = {name: b for name, b in self.named_buffers() if f"init.{name}" not in golden}
        self.load_state_dict({**statistics, **init})

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name in self.modalities}

    def features(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: encoder(inputs[name]) for name, encoder in self.encoders.items()}


class Maps(nn.Module):
    """An encoder, which gives what it would average."""

    def __init__(self, encoder: ConvEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.maps(x)


class AsReleased(Network):
    """The network under the names that `released/` asks for; its parameters keep the file's.

    Args:
        golden: As in `Network`.
        relu: As in `Network`.
        maps: True if an encoder that is called by itself gives maps.
    """

    def __init__(self, golden: Golden, relu: bool = False, maps: bool = False) -> None:
        super().__init__(golden, relu)
        # A tuple hides them: PyTorch looks for no module there.
        self._called = tuple(Maps(e) if maps else e for e in self.encoders.values())

    @property
    def audio_net(self) -> nn.Module:
        return self._called[0]

    @property
    def visual_net(self) -> nn.Module:
        return self._called[1]

    @property
    def fc(self) -> nn.Linear:
        return self.classifier if hasattr(self, "classifier") else self.head

    @property
    def fc_out(self) -> nn.Linear:
        return self.fusion

    def features(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(e(x) for e, x in zip(self.encoders.values(), inputs, strict=True))

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, v = self.features(audio, visual)
        if hasattr(self, "head"):
            return a, v, self.head(torch.cat([a, v], 1))
        return a, v, self.head_audio(a) + self.head_visual(v)


def sgd(golden: Golden, model: nn.Module) -> torch.optim.SGD:
    """The releases' optimizer."""
    names = {"lr": "learning_rate", "momentum": "momentum", "weight_decay": "weight_decay"}
    return torch.optim.SGD(model.parameters(), **{k: golden.hp(v) for k, v in names.items()})


def adamw(golden: Golden, model: nn.Module) -> torch.optim.AdamW:
    """OPM's."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=golden.hp("learning_rate"),
        betas=(golden.hp("beta1"), golden.hp("beta2")),
        eps=golden.hp("adam_eps"),
        weight_decay=golden.hp("weight_decay"),
    )


def numbers(values: Iterable[Tensor | float]) -> Tensor:
    """0-d tensors and numbers as one vector."""
    return torch.stack([torch.as_tensor(v, dtype=torch.float64).detach() for v in values])


class Replay:
    """Goes through the steps of a file and compares what comes out with what it holds.

    ::

        run = Replay(golden, model, optimizer, forced)
        for t in run.steps():
            inputs, labels = run.batch()
            ...                       # forward and backward pass, the method
            run.record(score=...)
            run.step()                # the optimizer's
        run.check()

    Gradients are recorded as backward leaves them and as the optimizer sees them, parameters as the
    optimizer leaves them. Free running, an error of one step reaches the next. Forced, everything
    is compared and then replaced by the file's: raw gradients before the method sees them, the
    method's gradients before the optimizer does, and the parameters after it; what remains the
    replay's own is the state of the method.

    A step of `released/` makes the optimizer's step itself: it gets the replay as its optimizer.

    Args:
        golden: The file.
        model: Holds the file's initial parameters.
        optimizer: Of all parameters.
        forced: True to go on from the file's numbers.
        backwards: 1 if each step has one backward pass. With more the test calls `raw()` after the
            last.
    """

    def __init__(
        self,
        golden: Golden,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forced: bool,
        backwards: int = 1,
    ) -> None:
        self.golden = golden
        self.model = model
        self.optimizer = optimizer
        self.forced = forced
        self.recorded: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._t = 0
        self._stepped = 0
        if backwards == 1:
            for name, parameter in model.named_parameters():
                if self._left_out(name):
                    continue
                parameter.register_post_accumulate_grad_hook(self._keep_raw(name))

    def _keep_raw(self, name: str) -> Callable[[Tensor], None]:
        def keep(parameter: Tensor) -> None:
            self._compare_later(f"grad.{name}", parameter.grad)

        return keep

    def raw(self) -> None:
        """Keeps the gradients as they are now."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not self._left_out(name):
                self._compare_later(f"grad.{name}", parameter.grad)

    def _left_out(self, name: str) -> bool:
        """True if the file holds the gradient of each loss, and leaves out that of their sum."""
        return f"grad.{name}" not in self.golden and f"grad_after.{name}" in self.golden

    @torch.no_grad()
    def _compare_later(self, key: str, tensor: Tensor, fallback: str | None = None) -> None:
        """Records; where forced, puts the file's numbers in its place."""
        self.recorded[key].append(tensor.detach().clone())
        if self.forced:
            given = key if key in self.golden or fallback is None else fallback
            # Not the step: where modalities take turns, some arrays have more entries than others.
            tensor.copy_(self.golden[given][len(self.recorded[key]) - 1])

    def steps(self) -> Iterator[int]:
        threads = torch.get_num_threads()
        # The files were made with one; several would wait for each other longer than they work.
        torch.set_num_threads(1)
        try:
            for t in range(self.golden.steps):
                self._t = t
                self.optimizer.zero_grad(set_to_none=True)
                yield t
                assert self._stepped == t + 1, "the body of the loop must call step()"
        finally:
            torch.set_num_threads(threads)

    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by modality, and labels, or the target of a regression."""
        inputs = {name: x[self._t] for name, x in self.golden.starting_with("x.").items()}
        return inputs, self.golden["target" if "target" in self.golden else "y"][self._t]

    def record(self, **values: Tensor | float | bool) -> None:
        """Keeps what came out, to be compared with the arrays of these names."""
        for key, value in values.items():
            made = torch.as_tensor(value, dtype=torch.float64)
            self.recorded[key].append(made.detach().clone())

    @property
    def param_groups(self) -> list[dict[str, object]]:
        """The optimizer's."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """The optimizer's."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """The optimizer's step."""
        for name, parameter in self.model.named_parameters():
            if f"grad.{name}" in self.golden or f"grad_after.{name}" in self.golden:
                assert parameter.grad is not None, f"{name} has no gradient"
                self._compare_later(f"grad_after.{name}", parameter.grad, f"grad.{name}")
            else:
                assert parameter.grad is None, f"{name} has a gradient"
        self.optimizer.step()
        for name, parameter in self.model.named_parameters():
            if f"param.{name}" in self.golden:
                self._compare_later(f"param.{name}", parameter)
        self._stepped += 1

    def __getitem__(self, key: str) -> Tensor:
        """The recorded tensors of this name, stacked."""
        return torch.stack(self.recorded[key])

    def check(
        self,
        hidden: Collection[str] = (),
        tolerance: float = TOLERANCE,
        only: Collection[str] | None = None,
    ) -> None:
        """Compares all that the file holds.

        Args:
            hidden: Arrays that mmfuse does not show, and which the test has looked at in another
                way.
            tolerance: Relative to the largest entry of an array.
            only: Compare the numbers of these arrays alone; there must still be all of them.

        Raises:
            AssertionError: a number is off, or something was recorded too little or too much.
        """
        for name, parameter in self.model.named_parameters():
            if f"param.{name}" not in self.golden:
                assert torch.equal(parameter, self.golden[f"init.{name}"]), f"{name} has moved"
        expected = {key: key for key in self.golden.results - set(hidden)}
        for name in (k[5:] for k in self.golden.arrays if k.startswith("grad.")):
            # A file leaves out what the method has left as it was.
            expected.setdefault(f"grad_after.{name}", f"grad.{name}")
        assert set(hidden) <= self.golden.results, f"the file does not hold all of {hidden}"
        assert set(self.recorded) == set(expected), (
            f"compared but not in the file: {sorted(set(self.recorded) - set(expected))}; "
            f"in the file but not compared: {sorted(set(expected) - set(self.recorded))}"
        )
        wrong = []
        for key in sorted(expected if only is None else only):
            message = difference(self[key], self.golden[expected[key]], tolerance)
            if message is not None:
                wrong.append(f"{key}: {message}")
        assert not wrong, f"{self.golden.name}, forced={self.forced}\n" + "\n".join(wrong)


def difference(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> str | None:
    """The first error, or None if `got` is `want` within the tolerance."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, the file has {list(want.shape)}"
    error = (got.double() - want.double()).abs().reshape(len(want), -1)
    allowed = tolerance * want.abs().max().item()
    of_steps = error.amax(dim=1)
    # Turned round, so that a NaN is wrong as well.
    wrong = ~(of_steps <= allowed)
    if not wrong.any():
        return None
    first = int(wrong.nonzero()[0])
    return (
        f"step {first} is the first of {int(wrong.sum())} that are off; there by "
        f"{of_steps[first].item():.3g}, allowed are {allowed:.3g}"
    )
