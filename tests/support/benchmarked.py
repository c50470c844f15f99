"""Small workloads for the benchmark's cases; conftest.py makes the benchmark importable."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch
from cases import CASES, WORKLOADS, Case
from engine.process_case import ProcessCase
from engine.workloads import Workload

CPU = torch.device("cpu")
SHAPES = ((7, 3, 3, 3), (5,), (64, 33))
# The last tensor lifts the gradients over 1 MiB, from where on bandwidths are reported.
TINY = Workload("tiny", "a tiny model", encoders=(SHAPES, (*SHAPES, (270_000,))))
CONV = Workload("conv", "40 convolutions", encoders=(((4, 3, 3, 3),) * 20,) * 2)
LOGITS = WORKLOADS["classes_6"]
# Whatever else a case runs on, in small.
TINY_OF = {
    "gradients": TINY,
    "features": Workload("tiny_features", "", "features", batch=9, width=40),
    "inputs": Workload("tiny_inputs", "", "inputs", shape=(3, 2, 40, 40)),
    "representations": Workload("tiny_maps", "", "representations", shape=(3, 16, 4, 5)),
    "training": Workload("tiny_training", "", "training", batch=6, width=32, shape=(33, 40)),
    "pairs": Workload("tiny_pairs", "", "pairs", shape=(1, 5000)),
    "few_pairs": Workload("tiny_few_pairs", "", "few_pairs", shape=(1, 3000), bins=12),
    "samples": Workload("tiny_samples", "", "samples", shape=(7, 31), bins=10),
    "fusion": Workload("tiny_fusion", "", "fusion", batch=20, width=40, bins=9),
    "contrast": Workload("tiny_contrast", "", "contrast", batch=13, width=40),
}
# CREMA-D in small: clips of three frames, spectrograms of another shape.
CLIPS = dataclasses.replace(
    WORKLOADS["crema_d"], batch=6, width=32, encoders=(), shape=(33, 40), audio_shape=(41, 34)
)
# Those that call a provider here, and not in processes of their own.
CALLED = [case for case in CASES.values() if not isinstance(case, ProcessCase)]
TRAININGS = [case for case in CASES.values() if case.kind == "training" and not case.named_only]
GRADIENT_CASES = [case for case in CASES.values() if case.kind == "gradients"]
UPDATES = [case for case in GRADIENT_CASES if "update_grads_" in case.ops]


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """Small ones."""
    workload = next((w for w in WORKLOADS.values() if case.fits(w)), TINY)
    return case.make(TINY_OF.get(case.kind, workload), dtype, CPU)


def named(case: Case) -> str:
    """A name for pytest's ids."""
    return case.name


def read_csv(folder: Path) -> list[dict[str, str]]:
    """The rows of a run."""
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))
