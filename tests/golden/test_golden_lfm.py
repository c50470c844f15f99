"""LFM.official and the authors' code: ten epochs of 200, by the schedule and with learning."""

from __future__ import annotations

import torch
from cells import Cell
from torch import Tensor
from trajectory import Golden, Network, Replay, free_and_forced, on_every_backend, sgd

import mmfuse
from mmfuse.methods._lfm_weights import label_weight


def forward(model: Network, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    features = model.features(inputs)
    return {name: model.get_submodule(f"head_{name}")(f) for name, f in features.items()}


@on_every_backend
@free_and_forced
def test_official_reproduces_the_schedule(cell: Cell, forced: bool) -> None:
    cell.skip_slow(forced)
    golden = Golden("lfm_schedule")
    model = Network(golden)
    lfm = mmfuse.LFM.official(backend=cell.backend)
    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        lfm.set_epoch(int(golden["epoch"][t]))
        inputs, labels = run.batch()
        logits = forward(model, inputs)
        out = lfm(logits, labels)
        out.loss.backward()
        run.record(
            loss=torch.stack([out.loss, out.cross_entropy, out.alignment]),
            weights=out.coefficients,
            **{f"logits.{name}": z for name, z in logits.items()},
        )
        run.step()
    run.check(hidden=["schedule"])
    whole = torch.tensor([label_weight(epoch) for epoch in range(200)], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([whole, 1 - whole], 1), golden["schedule"])
    assert (whole > 1).nonzero().flatten().tolist() == list(range(177, 189))
    assert run["weights"][-2, 1] < 0, "the release drives the predictions apart in epoch 180"


@on_every_backend
@free_and_forced
def test_official_reproduces_the_learning(cell: Cell, forced: bool) -> None:
    cell.skip_slow(forced)
    golden = Golden("lfm_learnable")
    model = Network(golden)
    rate = golden.hp("initial_rate")
    lfm = mmfuse.LFM.official(weighting="learned", rate=rate, backend=cell.backend)
    assert lfm.weights.tolist() == golden["hp.initial_weights"].tolist()
    held_out = {name: x[:8] for name, x in golden.starting_with("validation_x.").items()}
    parameters = [p for encoder in model.encoders.values() for p in encoder.parameters()]
    parameters += [p for name, p in model.named_parameters() if name.startswith("head")]
    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        lfm.set_epoch(int(golden["epoch"][t]))
        lfm.learn(forward(model, held_out), golden["validation_y"][:8].long(), parameters)
        inputs, labels = run.batch()
        logits = forward(model, inputs)
        out = lfm(logits, labels)
        out.loss.backward()
        run.record(
            loss=torch.stack([out.loss, out.cross_entropy, out.alignment]),
            weights=out.coefficients,
            weight_rate=lfm.learning_rate,
            **{f"logits.{name}": z for name, z in logits.items()},
        )
        run.step()
    # The weights show the steps; test_released_lfm.py has the products that these are made of.
    products = [f"hessian_vector.{name}" for name in golden.starting_with("hessian_vector.")]
    run.check(hidden=["weight_step", *products])
    assert run["weights"][:, 0].unique().numel() >= 6, "they move, and stop at 0.05"
