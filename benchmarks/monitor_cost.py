"""What RedReg's monitor costs: `python benchmarks/monitor_cost.py` prints a table in Markdown.

Steps of a whole training with a monitor in every step, in every second, in every fourth, against
the same training without regulation. All take turns, four steps at a time, and only the ratios of
such turns are compared.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence

import _environment
import torch
from _inputs import EPOCHS, TrainingInputs, new_optimizer
from _measure import Call, Clock, Prepared, interleaved
from _networks import ThreeHeads
from _report import show_ratio, show_time
from _workloads import WORKLOADS, Workload
from torch.nn import functional as F

import mmfuse

# A turn: as many steps as the rarest monitor needs for one.
STEPS = 4
INTERVALS = (1, 2, 4)


def training(i: TrainingInputs, monitor_every: int | None, backend: str | None) -> Call:
    """One turn of training on a network of its own; None leaves out all regulation."""
    model = copy.deepcopy(i.model)
    optimizer = new_optimizer(model)
    inputs = {"audio": i.audio, "visual": i.visual}
    method = None
    if monitor_every is not None:
        method = mmfuse.RedReg(
            model.encoders, epochs=EPOCHS, monitor_every=monitor_every, backend=backend
        )
        method.set_epoch(0)

    def turn() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            a, v, out = model(i.audio, i.visual)
            logits = {"audio": model.head_audio(a), "visual": model.head_visual(v)}
            sum(F.cross_entropy(z, i.labels) for z in (out, *logits.values())).backward()
            if method is not None:
                method.step(logits, i.labels, {"audio": a, "visual": v}, inputs)
            optimizer.step()

    return turn


def expected(monitor_every: int) -> float:
    """A backward pass takes as long as two forward passes, of which the monitor adds two."""
    return 1 + 2 / (3 * monitor_every)


def measure(
    workload: Workload, device: torch.device, backend: str | None, seconds: float
) -> list[str]:
    """Lines of the table."""
    i = TrainingInputs(workload, torch.float32, device, network=ThreeHeads)
    variants = {None: "without regulation"} | {k: f"`monitor_every={k}`" for k in INTERVALS}
    turns = {name: Prepared(training(i, k, backend)) for k, name in variants.items()}
    for prepared in turns.values():
        prepared.call()
    samples = interleaved(turns, Clock(device), seconds, cold=False)
    plain = [s.device for s in samples[variants[None]]]
    lines = ["| training | a step | of plain training | expected |", "|---|--:|--:|--:|"]
    for k, name in variants.items():
        times = [s.device for s in samples[name]]
        ratio = statistics.median(t / p for t, p in zip(times, plain, strict=False))
        step = show_time(statistics.median(times) / STEPS * 1e3)
        wanted = show_ratio(1.0 if k is None else expected(k))
        lines.append(f"| {name} | {step} | {show_ratio(ratio)} | {wanted} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and what it depends on."""
    names = [name for name, workload in WORKLOADS.items() if workload.kind == "training"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=names, default=names[0])
    parser.add_argument("--device", type=torch.device)
    parser.add_argument("--backend", help="of mmfuse; default: the best one")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all variants together")
    options = parser.parse_args(argv)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bystanders = _environment.Bystanders()
    workload = WORKLOADS[options.workload]
    lines = measure(workload, device, options.backend, options.seconds)
    environment = _environment.describe(device)
    share = bystanders.share()
    if share is not None:
        environment["CPU taken by others"] = f"{share:.0%}"
    print(f"# What RedReg's monitor costs: {workload.title}\n")
    print("\n".join(f"- {key}: `{value}`" for key, value in environment.items()), end="\n\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
