"""A long run of all methods in turn, on several ranks, that watches itself.

    python tests/support/soak.py --ranks 2 --steps 5000

Every rank trains the same small network in DistributedDataParallel on its own batches, of other
sizes than the other ranks'. Each method has two epochs, then comes the next; after the last one the
first goes on. The ranks compare all of their state after every such visit, save it every 50 steps,
and count their memory at the end of every cycle, always at the same place. The run goes on from the
last checkpoint in its folder, if there is one.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import balancing
import torch
import torch.distributed as dist
from balancing import (
    ANCHORED,
    COMBINED,
    DRAWING,
    Shown,
    arguments,
    balance,
    joint_loss,
    make,
    strength,
    unimodal_losses,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import mmfuse

# Methods that act together are not trained alone as well.
_ALONE = [k for k in balancing.KINDS if not any(c.startswith(f"{k} + ") for c in COMBINED)]
ON_UPDATE = " on the update"
# One alone: all that are attached to an optimizer have to decide about each of its steps.
KINDS = (*_ALONE, *COMBINED, "OGM-GE" + ON_UPDATE)
# With these options a method acts only sometimes.
OPTIONS: dict[str, dict[str, Any]] = {
    "RedReg": {
        "epochs": 8,
        "threshold": 0.8,
        "window": 4,
        "monitor_every": 3,
        "agreement": (-2.0, -1.5),
    },
}
# Shapes for `Network`: DCP reads into buffers that must have them before the first step.
SHAPES: dict[str, Any] = {"num_classes": 5, "widths": (8, 8)}
STEPS_PER_EPOCH = 17
VISIT = 2 * STEPS_PER_EPOCH
CYCLE = VISIT * len(KINDS)
# No divisor of an epoch: most checkpoints lie within one.
SAVE_EVERY = 50
TELL_EVERY = 10
# Cycles until every buffer has its size: InfoReg's window opens in the third of its epochs.
WARM_UP = 3
# The heap is not compacted, and the pages of a process come and go: 0.2 MiB in the 13 cycles after
# the warm-up. One number kept in every step takes some 600 bytes, 2.3 MiB in those 3,978 steps.
RSS_NOISE = 2**20


class Encoder(nn.Module):
    """A convolution, batch norm and a linear layer: weights of four, one and two dimensions."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


class Network(nn.Module):
    """An audio and a visual encoder, a fused representation and the heads of all of them."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.audio_net = Encoder(1, width)
        self.visual_net = Encoder(3, width)
        self.neck = nn.Linear(2 * width, width)
        self.classifier = nn.Linear(width, classes)
        self.head = nn.Linear(2 * width, classes)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio_net, "visual": self.visual_net}

    def forward(
        self,
        audio: Tensor,
        visual: Tensor,
        labels: Tensor,
        between: nn.Module | None = None,
    ) -> tuple[Tensor, dict[str, Any], Any]:
        """The loss, what methods may look at, and what the method in between has said."""
        features = {"audio": self.audio_net(audio), "visual": self.visual_net(visual)}
        fused = self.neck(torch.cat(list(features.values()), 1))
        seen: dict[str, Any] = {
            "features": features,
            "inputs": {"audio": audio, "visual": visual},
            "logits": mmfuse.unimodal_logits(self.head, features),
            "labels": labels,
            "fused": fused,
            "fused_logits": self.classifier(fused),
        }
        out = None if between is None else between(**arguments(between, seen))
        loss = joint_loss(between, self.head, seen, out)
        loss = loss + F.cross_entropy(seen["fused_logits"], labels)
        return loss, seen, out


Batch = tuple[Tensor, Tensor, Tensor]


def batch(step: int, rank: int, size: int, classes: int = 5) -> Batch:
    """Audio that gives the class away, and an image that hardly does; the same at every call."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(0, classes, (size,), generator=generator)
    audio = torch.randn(size, 1, 8, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    return audio, torch.randn(size, 3, 6, 6, generator=generator), labels


def make_methods(
    kind: str, encoders: Mapping[str, nn.Module], anchor_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The objects of one of `KINDS`, with thresholds at which they act in every network."""
    made = {}
    for part in kind.removesuffix(ON_UPDATE).split(" + "):
        # They begin in epoch 1: which epoch it is has to come out of a checkpoint.
        options: dict[str, Any] = {"starts": 1, **OPTIONS.get(part, {})}
        taken = signature(mmfuse.METHODS[balancing.KINDS[part].method]).parameters
        options |= {name: shape for name, shape in SHAPES.items() if name in taken}
        if kind.endswith(ON_UPDATE):
            options["apply_to"] = "update"
        if part in ANCHORED:
            options["anchor_dtype"] = anchor_dtype
        made[part] = make(part, encoders, **options)
    return made


class Training:
    """A network, its optimizers, and the methods of the given kinds.

    Args:
        kinds: Of `KINDS`, or a part of one.
        network: The network.
        wrapped: The module to call instead, such as DistributedDataParallel around it.
        anchor_dtype: Of methods with anchors.
        fused: True if the optimizers are; PyTorch has no such kernels for DTensors on the CPU.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        network: Network,
        wrapped: nn.Module | None = None,
        anchor_dtype: torch.dtype | None = None,
        fused: bool = False,
    ) -> None:
        parameters = list(network.parameters())
        self.network = network
        self.wrapped = network if wrapped is None else wrapped
        self.methods = {k: make_methods(k, network.encoders, anchor_dtype) for k in kinds}
        # How much the last step has changed.
        self.strength = 0.0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        on_updates = [kind for kind in kinds if kind.endswith(ON_UPDATE)]
        if set(kinds).difference(on_updates):
            sgd = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, fused=fused)
            self.optimizers["sgd"] = sgd
        if on_updates:
            adamw = torch.optim.AdamW(parameters, lr=1e-3, fused=fused)
            self.optimizers["adamw"] = adamw
            for kind in on_updates:
                for method in self.methods[kind].values():
                    method.attach(adamw)

    def begin_epoch(self, kind: str, epoch: int) -> None:
        for method in self.methods[kind].values():
            method.set_epoch(epoch)

    def step(self, kind: str, batches: Sequence[Batch]) -> list[Any]:
        """One step on one or several micro-batches; what the methods have said."""
        methods = list(self.methods[kind].values())
        between, last = methods[0] if isinstance(methods[0], nn.Module) else None, methods[-1]
        optimizer = self.optimizers["adamw" if kind.endswith(ON_UPDATE) else "sgd"]
        results = []
        optimizer.zero_grad()
        for i, each in enumerate(batches, start=1):
            loss, seen, out = self.wrapped(*each, between)
            results += [loss.detach()] if out is None else [loss.detach(), out]
            loss = loss / len(batches)
            if i < len(batches):
                loss.backward()
                if isinstance(last, mmfuse.GradientMethod) and last.rule.need.second != "unimodal":
                    last.observe(**arguments(last, seen))
                continue
            losses = {name: z / len(batches) for name, z in unimodal_losses(seen).items()}
            said = balance(last, Shown(loss, losses, seen, out))
            self.strength = strength(last, seen, said)
            if said is not out:
                results.append(said)
        optimizer.step()
        return results

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "methods": {
                kind: {name: method.state_dict() for name, method in methods.items()}
                for kind, methods in self.methods.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for kind, methods in self.methods.items():
            for name, method in methods.items():
                method.load_state_dict(state["methods"][kind][name])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested containers and dataclasses, with where it is."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, value


def bits(value: Any) -> Any:
    """A value's key; two values have the same one if they are equal bit for bit, NaN included."""
    if not isinstance(value, Tensor):
        return repr(value)
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(value.dtype), tuple(value.shape), raw.numpy().tobytes()


def differences(a: Any, b: Any) -> list[str]:
    """The places at which two nested values are not equal bit for bit."""
    ours, theirs = ({path: bits(leaf) for path, leaf in leaves(x)} for x in (a, b))
    return sorted(p for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p))


def last_checkpoint(folder: Path) -> Path | None:
    found = sorted(folder.glob("step-*.pt"))
    return found[-1] if found else None


def _save(folder: Path, step: int, training: Training) -> None:
    partial = folder / "partial"
    torch.save({"step": step, **training.state_dict()}, partial)
    # A rank that is killed while it writes leaves the last checkpoint whole.
    partial.rename(folder / f"step-{step:06d}.pt")


def _compare_ranks(training: Training, seen: Collection[str], digests: Tensor) -> None:
    """Raises an AssertionError if the ranks' states differ.

    `digests` is [ranks, 32] in uint8 and written to. It is the same one at every call: gloo's
    thread lets go of a tensor after its caller has gone on, so that a new one would be counted.

    Batch norm's statistics are those of each rank's own batches until the next forward pass, where
    DistributedDataParallel gives everybody the first rank's. Streams are agreed upon where they are
    first drawn from: not before a method's first visit, and never by OGM without noise.
    """
    state = training.state_dict()
    state["methods"] = {
        kind: {
            name: {
                key: value for key, value in method.items() if key != "stream" or name in DRAWING
            }
            for name, method in methods.items()
        }
        for kind, methods in state["methods"].items()
        if kind in seen
    }
    digest = hashlib.sha256()
    for path, leaf in leaves(state):
        if not path.endswith(("running_mean", "running_var")):
            digest.update(f"{path}{bits(leaf)}".encode())
    digests.zero_()
    digests[dist.get_rank()] = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    dist.all_reduce(digests)
    found = [bytes(row.tolist()).hex() for row in digests]
    if len(set(found)) != 1:
        raise AssertionError(f"the ranks' states differ: {found}")


def _memory() -> dict[str, int]:
    gc.collect()
    # isinstance would ask an object for its __class__, at which some modules warn.
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "tensors": len(tensors),
        "bytes": sum(storages.values()),
        "rss": pages * resource.getpagesize(),
    }


def run_rank(rank: int, size: int, steps: int, folder: Path, timeout: float, leak: bool) -> None:
    """One rank of the soak."""

    def tell(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    torch.set_num_threads(1)
    # Other networks and streams on every rank: what must be equal has to be made so.
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    network = Network()
    training = Training(KINDS, network, DistributedDataParallel(network), fused=True)
    first = 0
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        saved = torch.load(checkpoint, weights_only=True)
        first = saved.pop("step")
        training.load_state_dict(saved)
    acted = dict.fromkeys(KINDS, 0)
    digests = torch.zeros(size, hashlib.sha256().digest_size, dtype=torch.uint8)
    kept = []
    for step in range(first, steps):
        kind = KINDS[step % CYCLE // VISIT]
        within = step % STEPS_PER_EPOCH
        if within == 0:
            training.begin_epoch(kind, 2 * (step // CYCLE) + step % VISIT // STEPS_PER_EPOCH)
        # Uneven, and in every step another ratio; the same at the end of every cycle.
        rows = 6 + within % 5 if rank % 2 == 0 else 3 + within % 7
        training.step(kind, [batch(step, rank, rows)])
        if leak:
            kept.append(torch.zeros(()))
        done = step + 1
        if done % TELL_EVERY == 0:
            tell(step=done)
            acted[kind] += training.strength > 0
        if done % VISIT == 0 or done == steps:
            _compare_ranks(training, KINDS[: step // VISIT + 1], digests)
        if rank == 0 and (done % SAVE_EVERY == 0 or done == steps):
            _save(folder, done, training)
        if done % CYCLE == 0:
            tell(memory=_memory())
    tell(acted=acted)
    dist.destroy_process_group()


def start(
    folder: Path, ranks: int, steps: int, *, timeout: float = 60.0, leak: bool = False
) -> list[subprocess.Popen[bytes]]:
    """Starts the ranks; rank r writes to rank-r.out and rank-r.err in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = []
    for rank in range(ranks):
        command = [sys.executable, __file__, "--ranks", str(ranks), "--steps", str(steps)]
        command += ["--folder", str(folder), "--timeout", str(timeout), "--rank", str(rank)]
        command += ["--leak"] * leak
        with (
            (folder / f"rank-{rank}.out").open("wb") as out,
            (folder / f"rank-{rank}.err").open("wb") as err,
        ):
            processes.append(
                subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=folder)
            )
    return processes


def told(folder: Path, rank: int, what: str) -> list[Any]:
    """All that a rank has said about something so far."""
    lines = (folder / f"rank-{rank}.out").read_bytes().split(b"\n")[:-1]
    said = map(json.loads, lines)
    return [line[what] for line in said if what in line]


def growth(folder: Path, rank: int) -> dict[str, int]:
    """The growth of a rank's memory since the warm-up, at most."""
    seen = told(folder, rank, "memory")
    if len(seen) <= WARM_UP:
        raise ValueError(f"{len(seen)} cycles are too few: a cycle has {CYCLE} steps")
    warm, later = seen[WARM_UP - 1], seen[WARM_UP:]
    return {key: max(m[key] for m in later) - warm[key] for key in warm}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--folder", type=Path, help="of checkpoints and logs; a new one if not set")
    parser.add_argument("--timeout", type=float, default=60.0, help="of a collective, in seconds")
    parser.add_argument("--leak", action="store_true", help="keep one number of every step")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(
            options.rank,
            options.ranks,
            options.steps,
            options.folder,
            options.timeout,
            options.leak,
        )
        sys.stdout.flush()
        # As torch.multiprocessing.spawn ends its ranks. If gloo's thread is the last to hold a
        # tensor, it asks for the lock of an interpreter that has gone, and the process aborts.
        os._exit(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        processes = start(
            folder, options.ranks, options.steps, timeout=options.timeout, leak=options.leak
        )
        codes = [process.wait() for process in processes]
        for rank in range(options.ranks):
            sys.stderr.write((folder / f"rank-{rank}.err").read_text())
        if any(codes):
            print(f"exit codes {codes}")
            return 1
        failed = False
        for rank in range(options.ranks):
            print(f"rank {rank}: acted in {told(folder, rank, 'acted')[-1]}")
            for seen in told(folder, rank, "memory"):
                print("  ", seen)
            grown = growth(folder, rank)
            failed |= grown["tensors"] > 0 or grown["bytes"] > 0 or grown["rss"] > RSS_NOISE
            print(f"   grown by {grown}")
    print("memory has grown" if failed else "the ranks stayed equal, memory did not grow")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
