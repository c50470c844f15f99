"""MMPareto.official and the authors' code: twelve steps, with a conflict and without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cells import Cell
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, free_and_forced, on_every_backend, sgd

import mmfuse


def replay(made: Callable[..., mmfuse.MMPareto], forced: bool) -> None:
    golden = Golden("mmpareto")
    model = Network(golden)
    mmpareto = made(model.encoders, gamma=golden.hp("gamma"))
    run = Replay(golden, model, sgd(golden, model), forced, backwards=2)
    parameters = {
        f"{m}.{name}": p for m, net in model.encoders.items() for name, p in net.named_parameters()
    }
    for _ in run.steps():
        inputs, labels = run.batch()
        features = model.features(inputs)
        logits = {m: model.get_submodule(f"head_{m}")(f) for m, f in features.items()}
        out = model.head(torch.cat(list(features.values()), 1))
        joint = F.cross_entropy(out, labels)
        unimodal = {m: F.cross_entropy(z, labels) for m, z in logits.items()}
        own = {"retain_graph": True, "allow_unused": True}
        first = torch.autograd.grad(joint, parameters.values(), **own)
        second = torch.autograd.grad(sum(unimodal.values()), parameters.values(), **own)
        result = mmpareto.backward(joint, unimodal_losses=unimodal)
        run.raw()  # the heads'
        run.record(
            loss=torch.stack([joint, *unimodal.values()]),
            cosine=result.cosines,
            weights=torch.stack([result.coefficients, 1 - result.coefficients], 1),
            **{f"grad_joint.{n}": g for n, g in zip(parameters, first, strict=True)},
            **{f"grad_unimodal.{n}": g for n, g in zip(parameters, second, strict=True)},
        )
        run.step()
    run.check()
    conflicts = run["cosine"] <= 0
    assert conflicts.sum(0).tolist() == [7, 8]
    assert bool((run["weights"][~conflicts] == 0.5).all())


@on_every_backend
@free_and_forced
def test_official_reproduces_the_released_code(cell: Cell, forced: bool) -> None:
    cell.skip_slow(forced)
    mmfuse.use_backend(cell.backend)
    replay(mmfuse.MMPareto.official, forced)


@free_and_forced
def test_so_does_the_default_since_no_tensors_gradients_cancel(forced: bool) -> None:
    replay(mmfuse.MMPareto, forced)
