"""Tuning by random search on validation data, the same number of trials for every way to train.

Optuna draws the trials and keeps them, so that a search that was stopped goes on where it was.
"""

from __future__ import annotations

import csv
import hashlib
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import mmfuse

from .baselines import Build, Plan
from .data import Split
from .settings import Drawn, folded, replace
from .training import Run
from .ways import ENSEMBLE, ONLY, method_of

LR = FloatDistribution(3e-3, 0.3, log=True)


class EachView(NamedTuple):
    """A value for each modality."""

    of: BaseDistribution


#: The search draws these beside the learning rate, around the papers' values; others that alone.
SPACES: dict[str, dict[str, BaseDistribution | EachView]] = {
    "OGM": {"alpha": FloatDistribution(0.1, 1.0)},
    "OPM": {"q_base": FloatDistribution(0.2, 0.8), "lam": FloatDistribution(0.1, 1.0)},
    "InfoReg": {
        "beta": FloatDistribution(0.5, 1.0),
        "threshold": FloatDistribution(0.01, 0.2, log=True),
    },
    "RedReg": {"gamma": FloatDistribution(0.2, 1.0), "beta": FloatDistribution(0.5, 1.0)},
    "MLB": {"alpha": FloatDistribution(0.2, 2.0), "beta": FloatDistribution(1.0, 4.0)},
    "MMPareto": {"gamma": FloatDistribution(1.0, 2.0)},
    "CGGM": {"rho": FloatDistribution(1.0, 1.5), "bound": FloatDistribution(1.2, 4.0)},
    "AGM": {"alpha": FloatDistribution(0.2, 3.0)},
    "ARL": {"temperature": FloatDistribution(1.0, 16.0), "gamma": FloatDistribution(1.0, 5.0)},
    "MCR": {"strength": FloatDistribution(1e-3, 0.3, log=True)},
    "PMR": {"alpha": FloatDistribution(0.2, 3.0), "momentum": FloatDistribution(0.0, 0.9)},
    "MLA": {"alpha": FloatDistribution(0.01, 1.0, log=True)},
    "ReLearning": {"lam": FloatDistribution(1.0, 10.0)},
    "LearningRates": {"rates": EachView(FloatDistribution(0.25, 4.0, log=True))},
    "ModalityDropout": {"rates": FloatDistribution(0.05, 0.6)},
}


def space(way: str, views: Sequence[str]) -> dict[str, BaseDistribution]:
    """The values to draw for a way to train; each modality's own is "<name>.<modality>"."""
    out: dict[str, BaseDistribution] = {"lr": LR}
    for name, values in SPACES.get(method_of(way) or "", {}).items():
        if isinstance(values, EachView):
            out |= {f"{name}.{view}": values.of for view in views}
        else:
            out[name] = values
    return out


def planned(plan: Plan, params: Drawn, seed: int) -> Plan:
    """The plan with what was drawn, for a seed."""
    lr, options = folded(params)
    return Plan(
        lr or plan.lr, plan.epochs, plan.batch_size, options, seed, plan.backend, plan.device
    )


class Search:
    """The trials of one data set, in a journal that survives a stop.

    Args:
        journal: File of the trials.
        task: Name of the data set.
        views: Its modalities.
        splits: By their seeds, which nothing else may use afterwards.
        plan: The settings that are not tuned.
        classes: How many.
    """

    def __init__(
        self,
        journal: Path,
        task: str,
        views: Sequence[str],
        splits: dict[int, Split],
        plan: Plan,
        classes: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal.parent.mkdir(parents=True, exist_ok=True)
        self.storage = JournalStorage(JournalFileBackend(str(journal)))
        self.task, self.views, self.splits = task, views, splits
        self.plan, self.classes = plan, classes

    def study(self, way: str) -> optuna.Study:
        """The trials of a way to train, with those of an earlier run of the same search."""
        drawn = sorted((name, repr(of)) for name, of in space(way, self.views).items())
        decides = (drawn, self.plan.epochs, self.plan.batch_size, sorted(self.splits))
        number = hashlib.sha256(repr((*decides, mmfuse.__version__)).encode()).hexdigest()[:8]
        return optuna.create_study(
            storage=self.storage,
            study_name=f"{self.task}: {way}: {number}",
            direction="maximize",
            load_if_exists=True,
        )

    def finished(self, way: str) -> list[optuna.trial.FrozenTrial]:
        """Trials that ran to their ends."""
        return self.study(way).get_trials(states=(TrialState.COMPLETE,))

    def trial(self, way: str, build: Build) -> None:
        """Draws the next trial and trains it on every split.

        Its value is the mean accuracy on the validation samples after the last epoch. Trial n
        draws from seed n, so that all ways to train try the same learning rates, and a search that
        goes on draws what one without a stop would have drawn.
        """
        study = self.study(way)
        done = len(self.finished(way))
        study.sampler = optuna.samplers.RandomSampler(seed=done)
        drawn = study.ask(space(way, self.views))
        values = [
            Run(build, split, planned(self.plan, drawn.params, seed), self.classes)
            .train()
            .accuracy[-1]
            .item()
            for seed, split in self.splits.items()
        ]
        study.tell(drawn, statistics.fmean(values))

    def best(self, way: str, trials: int) -> Drawn:
        """The values that the best of the first trials drew; of equal ones, the first."""
        finished = self.finished(way)[:trials]
        return max(finished, key=lambda trial: trial.value or 0.0).params


def best(search: Search, ways: Sequence[str], trials: int) -> dict[str, Drawn]:
    """Way → what its best trial drew, for all that have as many trials as that.

    The ensemble takes over the learning rates of its members.
    """
    out = {
        way: search.best(way, trials)
        for way in ways
        if way != ENSEMBLE and len(search.finished(way)) >= trials
    }
    members = {way: params["lr"] for way, params in out.items() if way.startswith(ONLY)}
    if ENSEMBLE in ways and len(members) == sum(way.startswith(ONLY) for way in ways):
        rates = {f"rates.{way.removeprefix(ONLY)}": lr for way, lr in members.items()}
        out[ENSEMBLE] = {"lr": max(members.values()), **rates}
    return out


def save_trials(path: Path, search: Search, ways: Sequence[str], trials: int) -> None:
    """Writes all trials of these ways to train as a table; what it has of other ways stays."""
    head = ["method", "trial", "validation accuracy", "drawn"]
    lines: dict[str, list[list[str]]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for line in csv.reader(file):
                if line != head:
                    lines.setdefault(line[0], []).append(line)
    for way in ways:
        lines[way] = [
            [way, str(n), f"{trial.value:.4f}", _in_words(trial.params)]
            for n, trial in enumerate(search.finished(way)[:trials])
        ]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(head)
    for of_way in lines.values():
        table.writerows(of_way)
    replace(path, text.getvalue())


def _in_words(params: Drawn) -> str:
    return "; ".join(f"{name} {value:.4g}" for name, value in params.items())
