"""Provider `plain`: the training steps without their method: same network, losses and optimizer."""

from __future__ import annotations

import torch
from _inputs import TrainingInputs
from torch.nn import functional as F


def ogm_training(i: TrainingInputs) -> None:
    i.optimizer.zero_grad()
    _, _, out = i.model(i.audio, i.visual)
    F.cross_entropy(out, i.labels).backward()
    i.optimizer.step()


ogm_ge_training = ogm_training
opm_training = ogm_training


def arm_training(i: TrainingInputs) -> None:
    i.optimizer.zero_grad()
    a, v = i.model.features(i.audio, i.visual)
    out = i.model.fc(i.model.fc_out(torch.cat([v, a], dim=1)))
    F.cross_entropy(out, i.labels).backward()
    i.optimizer.step()


def inforeg_training(i: TrainingInputs) -> None:
    i.optimizer.zero_grad()
    a, v, out = i.model(i.audio, i.visual)
    weight_a, weight_v = i.model.fc.weight.chunk(2, dim=1)
    rows = ((a, weight_a), (v, weight_v))
    logits = [out, *(F.linear(x, w, i.model.fc.bias / 2) for x, w in rows)]
    sum(F.cross_entropy(z, i.labels) for z in logits).backward()
    i.optimizer.step()


def redreg_training(i: TrainingInputs) -> None:
    i.optimizer.zero_grad()
    a, v, out = i.model(i.audio, i.visual)
    logits = (out, i.model.head_audio(a), i.model.head_visual(v))
    sum(F.cross_entropy(z, i.labels) for z in logits).backward()
    i.optimizer.step()
