"""Reports of models as the three training frameworks leave and use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reported import Fused, same, samples, state_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import mmfuse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
]

NAMES = ("audio", "visual")
WIDTHS = dict.fromkeys(NAMES, 3)


def expected(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Accuracies by hand, of a copy in evaluation mode."""
    model.eval()
    found = {}
    with torch.no_grad():
        for name in ("joint", *NAMES):
            given = {n: x if name in ("joint", n) else 0 * x for n, x in inputs.items()}
            hit = model(**given).argmax(1) == labels
            found[name] = float(hit.double().mean())
    return found


def check(report: mmfuse.ImbalanceReport, hand: dict[str, float]) -> None:
    assert report.joint.value == pytest.approx(hand["joint"])
    for name in NAMES:
        assert report.alone[name].value == pytest.approx(hand[name])
        assert report.probes[name].joint.value > 0.5


def test_lightning(tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer

    from mmfuse.adapters.lightning import Balance

    history: list[Any] = []

    class Digits(LightningModule):
        def __init__(self, balance: Balance) -> None:
            super().__init__()
            self.net = Fused(WIDTHS)
            self.balance = balance

        def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
            return self.net(audio=audio, visual=visual)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            *inputs, labels = batch
            pairs = zip(NAMES, inputs, strict=True)
            features = {n: self.net.encoders[n](x) for n, x in pairs}
            self.balance.observe(mmfuse.unimodal_logits(self.net.head, features), labels)
            return F.cross_entropy(self.net.head(torch.cat(list(features.values()), 1)), labels)

        def on_train_batch_end(self, *args: Any) -> None:
            history.append(self.balance.result.as_dict())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    inputs, labels = samples(NAMES, rows=96)
    loader = DataLoader(TensorDataset(*inputs.values(), labels), 32)
    encoders = {n: f"net.encoders.{n}" for n in NAMES}
    balance = Balance(mmfuse.OGM, encoders, log_every=None)
    module = Digits(balance)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=[balance],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    module.train()
    before = state_of(module)
    report = mmfuse.imbalance_report(
        module,
        loader,
        modalities=NAMES,
        encoders=encoders,
        train_loader=loader,
        history=history,
        resamples=5,
    )
    assert same(state_of(module), before)
    check(report, expected(module.net, inputs, labels))
    assert report.history is not None and len(report.history.steps) == len(history) == 12


class Samples(Dataset):  # type: ignore[type-arg]
    def __init__(self, inputs: dict[str, Tensor], labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {**{n: x[i] for n, x in self.inputs.items()}, "labels": self.labels[i]}


def test_transformers(tmp_path: Path) -> None:
    from transformers import TrainingArguments
    from transformers.modeling_outputs import SequenceClassifierOutput

    from mmfuse.adapters.transformers import BalancedTrainer

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Fused(WIDTHS)

        def forward(self, audio: Tensor, visual: Tensor, labels: Tensor | None = None) -> Any:
            features = {
                "audio": self.net.encoders["audio"](audio),
                "visual": self.net.encoders["visual"](visual),
            }
            logits = self.net.head(torch.cat(list(features.values()), 1))
            loss = None if labels is None else F.cross_entropy(logits, labels)
            out = SequenceClassifierOutput(loss=loss, logits=logits)
            out["modality_logits"] = mmfuse.unimodal_logits(self.net.head, features)
            return out

    inputs, labels = samples(NAMES, rows=96)
    data = Samples(inputs, labels)
    model = Classifier()
    encoders = {n: f"net.encoders.{n}" for n in NAMES}
    trainer = BalancedTrainer(
        model,
        TrainingArguments(
            str(tmp_path),
            num_train_epochs=4,
            per_device_train_batch_size=32,
            learning_rate=0.1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        balance=lambda module: mmfuse.OGM(mmfuse.match_parameters(module, encoders)),
    )
    with pytest.warns(RuntimeWarning, match="Adam"):
        trainer.train()
    before = state_of(model)
    report = mmfuse.imbalance_report(
        trainer.model,
        trainer.get_eval_dataloader(),
        output=lambda out: out.logits,
        encoders=encoders,
        train_loader=trainer.get_train_dataloader(),
        resamples=5,
    )
    assert same(state_of(model), before)
    check(report, expected(model.net, inputs, labels))


def test_accelerate() -> None:
    from accelerate import Accelerator

    inputs, labels = samples(NAMES, rows=96)
    accelerator = Accelerator(cpu=True)
    model, loader = accelerator.prepare(
        Fused(WIDTHS), DataLoader(Samples(inputs, labels), 32, shuffle=True)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(
                F.cross_entropy(model(**{n: batch[n] for n in NAMES}), batch["labels"])
            )
            optimizer.step()
    state = state_of(model), torch.get_rng_state()
    report = mmfuse.imbalance_report(
        model,
        loader,
        encoders={n: f"encoders.{n}" for n in NAMES},
        train_loader=loader,
        resamples=5,
    )
    assert same((state_of(model), torch.get_rng_state()), state)
    check(report, expected(model, inputs, labels))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    inputs, labels = samples(NAMES, rows=96)
    model = Fused(WIDTHS)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(model)
        report = mmfuse.imbalance_report(
            replica,
            [(inputs, labels)],
            encoders={"audio": "encoders.audio"},
            train_loader=[(inputs, labels)],
            resamples=5,
        )
    finally:
        torch.distributed.destroy_process_group()
    hand = expected(model, inputs, labels)
    assert report.joint.value == pytest.approx(hand["joint"])
    assert list(report.probes) == ["audio"]
