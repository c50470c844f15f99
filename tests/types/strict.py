"""A user's script for type checkers, which run on it in their strict modes; nothing runs it.

`make lint` has mypy and pyright's engine look at it, and at how complete the public types are.
"""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

import mmfuse

encoders = {"audio": nn.Linear(5, 4), "visual": nn.Linear(7, 4)}
inputs = {"audio": torch.randn(8, 5), "visual": torch.randn(8, 7)}
head = nn.Linear(8, 3)
labels = torch.zeros(8, dtype=torch.int64)
features: dict[str, Tensor] = {name: net(inputs[name]) for name, net in encoders.items()}
logits = mmfuse.unimodal_logits(head, features)
loss = nn.functional.cross_entropy(head(torch.cat(list(features.values()), 1)), labels)

out = mmfuse.ogm_backward(loss, encoders, logits, labels)
assert_type(out, mmfuse.OGMResult)
assert_type(out.coefficients, Tensor)
assert_type(out.as_dict(), dict[str, Tensor])
assert_type(mmfuse.scalars_of(out, encoders), dict[str, Tensor])
assert_type(mmfuse.scalars_of(out, ["audio", "visual"]), dict[str, Tensor])

# A module's call has the types of its forward pass.
opm = mmfuse.OPM()
assert_type(opm(features, logits, labels), mmfuse.OPMResult)
arm = mmfuse.ARM()
assert_type(
    arm(features, features["audio"], logits, head(features["audio"]), labels).nmi, Tensor | None
)

# Encoders may be what a model keeps them in, or lists of parameters.
mmfuse.OGM(nn.ModuleDict(encoders))
mmfuse.RedReg(nn.ModuleDict(encoders))
mmfuse.MLB({name: list(net.parameters()) for name, net in encoders.items()})

inforeg = mmfuse.InfoReg(encoders, beta=0.9, starts=1)
inforeg.set_epoch(0)
with mmfuse.use_backend("reference"):
    inforeg.step(logits, labels)
with mmfuse.ScalarLog(lambda scalars, step: print(step, scalars), every=10) as log:
    log.add(0, out.as_dict())

report = mmfuse.imbalance_report(head, [(inputs, labels)], encoders=encoders, train_loader=[])
mmfuse.imbalance_report(head, [(inputs, labels)], encoders=nn.ModuleDict(encoders))
mmfuse.imbalance_report(head, [(inputs, labels)], encoders={"audio": "audio_net"})
assert_type(report, mmfuse.ImbalanceReport)
assert_type(report.joint.low, float | None)
assert_type(report.findings, list[str])
