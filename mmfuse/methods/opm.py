"""OPM: on-the-fly prediction modulation.

Wei, Hu, Du & Wen, "On-the-fly Modulation for Balanced Multimodal Learning", TPAMI 2024.

Where OGM slows the dominant modality in the backward pass, OPM weakens it in the forward pass: its
feature is dropped, sample by sample, with a probability that rises with its dominance, so that the
joint prediction has to do without it and the other encoder gets the gradient:

    score        S_m = mean over the batch of p_i^m, from the undropped features
    ratio        rho_m = mean over j != m of S_m / S_j
    probability  q_m = min(1, q_base (1 + lam tanh(rho_m - 1)))  if rho_m > 1, else 0
    drop         phi_i^m <- 0 with probability q_m

q is that of the previous step, 0 in the first. The weakest modality has rho <= 1, hence q = 0: no
sample loses all its modalities, however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..loop.contract import Card
from ..loop.epochs import EpochWindow
from ..loop.modalities import check_names, named_features
from ..loop.ranks import Group, agree, check_group, mean_over_ranks, rank_and_size
from ..loop.state import in_backward
from ..noise import NoiseStream
from ..ops._tensors import kept_tensor
from ..ops.discrepancy_ratios import discrepancy_ratios
from ..ops.drop_modalities import named_drop
from ..ops.modality_scores import named_scores


@dataclass(frozen=True)
class OPMResult:
    """What was dropped and why; nothing here has waited for the device.

    Attributes:
        features: Name → the feature, zero where it was dropped.
        keep: [M, B] bool, in the order of `features`; False where it was dropped.
        drop_probability: [M] q_m that this step has used.
        scores: [M] S_m of this step, batch mean of the true class's probability; None in `eval()`.
        ratios: [M] rho_m of this step; None in `eval()`.
        rows: Indices of the samples that are left, to select their labels with; None if all are.
            Only `OPM.official` removes samples.
    """

    features: dict[str, Tensor]
    keep: Tensor
    drop_probability: Tensor
    scores: Tensor | None
    ratios: Tensor | None
    rows: Tensor | None = None


def drop_probabilities(ratios: Tensor, q_base: float = 0.5, lam: float = 0.5) -> Tensor:
    """q_m = min(1, q_base·(1 + λ·tanh(ρ_m − 1))) for ρ_m > 1, else 0 (TPAMI 2024).

    Args:
        ratios: [M] discrepancy ratios ρ_m.
        q_base: Probability at ρ just above 1, in [0, 1].
        lam: λ ≥ 0, how much it rises with ρ.

    Returns:
        [M] in [0, 1]; 0 where ρ is NaN.
    """
    q = (q_base * (1 + lam * torch.tanh(ratios - 1))).clamp(max=1)
    return torch.where(ratios > 1, q, 0.0)


class OPM(EpochWindow, nn.Module):
    """OPM, between the encoders and the fusion.

    ::

        opm = mmfuse.OPM()
        for images, sounds, labels in loader:
            features = {"audio": audio_net(sounds), "visual": visual_net(images)}
            logits = mmfuse.unimodal_logits(head, features)
            kept = opm(features, logits, labels).features
            loss = F.cross_entropy(head(torch.cat(list(kept.values()), 1)), labels)
            mmfuse.ogm_backward(loss, encoders, logits, labels)   # or loss.backward()

    Both OPM and OGM see the logits of the undropped features; together they are the paper's
    OPM + OGM. In `eval()` the features pass unchanged, and logits and labels are not looked at.

    One launch reads and writes every feature once; the mask comes from the noise stream. The state
    (q, the stream) is in buffers, so that it follows the module to its device and into its
    `state_dict`.

    Args:
        q_base: Probability at which a modality that is just dominant is dropped, in [0, 1].
        lam: λ ≥ 0, how much it rises with dominance.
        num_modalities: M ≥ 2.
        starts: First epoch in which features are dropped; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: The ranks whose samples the scores are averaged over: None for all where
            torch.distributed is initialized, False for this rank alone. With ranks of one batch
            size B, sample i of rank r draws the number of sample r·B + i of the whole batch.
        stream: The random stream, whose state becomes a buffer; None makes one from
            `torch.initial_seed()`, at step 0. In a distributed run the first rank's is taken over
            by all.
        backend: Name of a backend; None for the best one.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Wei et al., TPAMI 2024", "feature", "GeWu-Lab/BML_TPAMI2024 at 4b3aa4f", golden=True
    )
    q: Tensor
    noise_state: Tensor

    def __init__(
        self,
        q_base: float = 0.5,
        lam: float = 0.5,
        *,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        stream: NoiseStream | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= q_base <= 1:
            raise ValueError(f"q_base must be a probability in [0, 1], got {q_base}")
        if not (math.isfinite(lam) and lam >= 0):
            raise ValueError(f"lam must be a finite number of at least 0, got {lam}")
        if num_modalities < 2:
            raise ValueError(f"balancing needs at least two modalities, got {num_modalities}")
        self._set_window(starts, ends)
        self.q_base = q_base
        self.lam = lam
        self.num_modalities = num_modalities
        self.process_group = check_group(process_group)
        self.backend = backend
        self._agreed = False
        self._p_exe: float | None = None
        self._theta_gradient = False
        self.register_buffer("q", torch.zeros(num_modalities))
        self.register_buffer("noise_state", (stream or NoiseStream()).state)

    @classmethod
    def official(
        cls,
        q_base: float = 0.5,
        lam: float = 0.5,
        p_exe: float = 0.7,
        *,
        theta_gradient: bool = True,
        num_modalities: int = 2,
        starts: int = 6,
        process_group: Group = None,
        stream: NoiseStream | None = None,
        backend: str | None = None,
    ) -> OPM:
        """What the authors' released code runs, to reproduce its tables.

        q is that of the same step; features are dropped in a share `p_exe` of the steps only; all
        that is left, gradients included, is divided by 1 − θ with θ = Σ d_m q_m / Σ d_m over the
        features' widths d_m; samples that have lost everything are removed, which makes shapes
        dynamic and waits for the device; epochs 0 to 5 are left alone (call `set_epoch`). q is of
        the dtype of the module, which a float64 network wants to be ``.double()``.

        The released code's division has a backward pass of its own, which passes θ itself back to
        θ, and from there to the features through their scores: the gradient of an additional loss
        θ²/2, whatever the loss is scaled by. It has been seen to change an encoder's gradient by a
        tenth. The features get it as well, the head does not.

        Args:
            q_base: As in `OPM`.
            lam: As in `OPM`.
            p_exe: Share of the steps in which features are dropped, in [0, 1].
            theta_gradient: Whether the features get θ's gradient, as they do in the released code.
                It takes one more pass, forth and back, between features and scores; `logits` that
                do not come from `features` pass nothing back.
            num_modalities: As in `OPM`.
            starts: As in `OPM`.
            process_group: As in `OPM`.
            stream: As in `OPM`. Whether a step drops is decided by the first number of the id
                after the modalities'.
            backend: As in `OPM`.

        Raises:
            ValueError: a hyper-parameter is out of range.
        """
        if not 0 <= p_exe <= 1:
            raise ValueError(f"p_exe must be a probability in [0, 1], got {p_exe}")
        made = cls(
            q_base,
            lam,
            num_modalities=num_modalities,
            starts=starts,
            process_group=process_group,
            stream=stream,
            backend=backend,
        )
        made._p_exe = p_exe
        made._theta_gradient = theta_gradient
        return made

    def forward(
        self,
        features: Mapping[str, Tensor],
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> OPMResult:
        """Drops dominant modalities, sample by sample.

        Args:
            features: Name → [B, …] for the M modalities.
            logits: Name → [B, C] logits of each modality alone, from the undropped features (see
                `mmfuse.unimodal_logits`). Not needed in `eval()`.
            labels: [B] integer class indices; rows labelled −100 do not count. Not needed in
                `eval()`.

        Returns:
            `OPMResult`, differentiable in the features.

        Raises:
            RuntimeError: it is called in a backward pass, by activation checkpointing.
            TypeError: features, logits or labels have an unsupported type, or are missing.
            ValueError: names, numbers or shapes do not fit, or a label is out of range. Nothing has
                been changed then.
        """
        names, values = named_features("OPM", features, self.num_modalities)
        if not self.training:
            keep = torch.ones(
                len(names), values[0].shape[0], dtype=torch.bool, device=values[0].device
            )
            return OPMResult(dict(features), keep, torch.zeros_like(self.q), None, None)
        if in_backward():
            raise RuntimeError(
                "OPM is called in a backward pass, as activation checkpointing does, and would "
                "draw another mask there; leave OPM outside of the checkpointed part"
            )
        if logits is None or labels is None:
            raise TypeError("OPM needs logits and labels in training; call eval() to pass through")
        self._warn_if_untold("OPM")
        scores, ratios = self._sense(names, values, logits, labels)
        current = drop_probabilities(ratios, self.q_base, self.lam).to(self.q)
        with torch.no_grad():
            q = current if self._p_exe is not None else self.q.clone()
            q = q if self.modulating else torch.zeros_like(q)
        if self._p_exe is None:
            result = self._drop(names, values, q, None)
        else:
            q = self._executed(q)
            if self._theta_gradient and self.modulating and torch.is_grad_enabled():
                values = self._with_theta_gradient(names, values, logits, labels, scores, q)
            result = self._drop_as_released(names, values, q)
        with torch.no_grad():
            self.q.copy_(current)
            self.noise_state[1].add_(1)
        return OPMResult(
            result.features, result.keep, result.drop_probability, scores, ratios, result.rows
        )

    @torch.no_grad()
    def _sense(
        self,
        names: list[str],
        features: list[Tensor],
        logits: Mapping[str, Tensor],
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        check_names("logits", logits, names, "features")
        if labels.dim() == 1 and len(labels) != features[0].shape[0]:
            raise ValueError(
                f"labels has {len(labels)} rows, features[{names[0]!r}] {features[0].shape[0]}"
            )
        ordered = [logits[name] for name in names]
        scores = named_scores([f"logits[{n!r}]" for n in names], ordered, labels, self.backend)
        prob = mean_over_ranks(scores.prob, labels, self.process_group)
        return prob, discrepancy_ratios(prob, backend=self.backend)

    def _stream(self) -> NoiseStream:
        stream = NoiseStream.from_state(self.noise_state)
        stream.agreed = self._agreed
        agree(stream, self.process_group)
        self._agreed = stream.agreed
        return stream

    def _drop(
        self, names: list[str], features: list[Tensor], q: Tensor, scale: Tensor | None
    ) -> OPMResult:
        labels = [f"features[{name!r}]" for name in names]
        first = rank_and_size(self.process_group)[0] * features[0].shape[0]
        placed = self._stream().place(range(len(names)), [first] * len(names))
        out = named_drop(labels, features, q, placed, scale, self.backend)
        kept = dict(zip(names, out.features, strict=True))
        return OPMResult(kept, out.keep, q, None, None)

    @torch.no_grad()
    def _executed(self, q: Tensor) -> Tensor:
        """Q in a share of the steps, 0 in the others."""
        assert self._p_exe is not None
        drawn = self._stream().uniform(1, stream_id=self.num_modalities)[0]
        return torch.where(drawn >= 1 - self._p_exe, q, 0.0)

    def _with_theta_gradient(
        self,
        names: list[str],
        features: list[Tensor],
        logits: Mapping[str, Tensor],
        labels: Tensor,
        scores: Tensor,
        q: Tensor,
    ) -> list[Tensor]:
        """The features; in the backward pass they also get the gradient of θ²/2, θ that of `q`."""
        wanted = [m for m, feature in enumerate(features) if feature.requires_grad]
        own = named_scores(
            [f"logits[{n!r}]" for n in names], [logits[n] for n in names], labels, self.backend
        ).prob
        if not wanted or not own.requires_grad:
            return features
        # All ranks' scores, through which this rank's pass their gradients.
        s = scores + (own - own.detach())
        ratios = ((s.unsqueeze(1) / s).sum(1) - 1) / (len(names) - 1)
        # Where q is 0, nothing is dropped in this step, and nothing depends on the ratio.
        probabilities = drop_probabilities(ratios, self.q_base, self.lam).to(q)
        half_square = _theta(features, torch.where(q > 0, probabilities, 0.0)).square() / 2
        found = torch.autograd.grad(
            half_square, [features[m] for m in wanted], retain_graph=True, allow_unused=True
        )
        out = list(features)
        for m, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                out[m] = _AddToGradient.apply(features[m], gradient)
        return out

    def _drop_as_released(self, names: list[str], features: list[Tensor], q: Tensor) -> OPMResult:
        with torch.no_grad():
            scale = 1 / (1 - _theta(features, q))
        dropped = self._drop(names, features, q, scale)
        rows = dropped.keep.any(0).nonzero().squeeze(1)
        left = {name: feature[rows] for name, feature in dropped.features.items()}
        return OPMResult(left, dropped.keep, q, None, None, rows)

    def get_extra_state(self) -> dict[str, Any]:
        """Format and epoch, which is no tensor: reading it must not wait for the device."""
        return self._extra_state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Goes on in the epoch in which the state was taken.

        Raises:
            ValueError: the state is of another format.
        """
        self._set_extra_state("OPM", state)
        self._agreed = False

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"q_base={self.q_base}, lam={self.lam}, num_modalities={self.num_modalities}"


def _theta(features: list[Tensor], q: Tensor) -> Tensor:
    """0-d θ = Σ d_m q_m / Σ d_m, d_m the widths of the features."""
    sizes = tuple(math.prod(f.shape[1:]) for f in features)
    widths = kept_tensor(sizes, (len(sizes),), q.dtype, q.device)
    return (widths * q).sum() / widths.sum()


class _AddToGradient(torch.autograd.Function):
    """x; the backward pass adds a given tensor to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0] + gradient, None
