"""Each modality's outputs, from a model of which only the inputs are known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._numbers import flag
from ..ops._arguments import check_instance
from .passes import check_made, scoring, training

Inputs = Mapping[str, Tensor]
#: Stands for an input that is masked: a name of a kind, or a callable on name and input.
Baseline = Literal["zero", "mean"] | Callable[[str, Tensor], Tensor]

_BASELINES = ("zero", "mean")


def unimodal_outputs(
    model: Callable[..., Any],
    inputs: Inputs,
    *,
    baseline: Baseline = "zero",
    forward: Callable[[dict[str, Tensor]], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    differentiable: bool = False,
) -> dict[str, Tensor]:
    """The outputs of each modality alone, by masking the inputs of all others.

    For any fusion, also where no encoder has a modality of its own: one forward pass for each of
    the M modalities, in which the others' inputs are replaced by a baseline. It goes into a
    method's `step` as logits::

        logits = mmfuse.unimodal_outputs(model, {"audio": audio, "visual": visual})
        method.step(logits, labels)

    Equivalent to, for two modalities and ``baseline="zero"``, in evaluation mode and without
    gradients::

        {"audio": model(audio=audio, visual=torch.zeros_like(visual)),
         "visual": model(audio=torch.zeros_like(audio), visual=visual)}

    The passes leave no trace: batch norm's statistics, training flags, PyTorch's random state and
    the inputs, of which the model gets copies, stay as they were. Your own forward hooks run. A
    model in DistributedDataParallel is called without it, for nothing has to be synchronised. So a
    loss of differentiable outputs must be a term of the loss of the model's own forward pass: the
    gradients of a backward pass of its own are not reduced. FSDP2 gathers parameters in each pass,
    so that all ranks must call this.

    Args:
        model: A module or another callable on the inputs.
        inputs: Name → input; the model gets them as arguments of these names. Whatever else it
            needs, such as a padding mask, `forward` adds.
        baseline: The input that stands in for a masked modality's. "zero" are zeros, for token ids
            the token 0; "mean" is the batch's mean over dim 0 for every sample, of floating inputs
            (of a batch of one sample that sample itself, which masks nothing); a callable gets
            name and input and returns a tensor like the input. It is called once for each
            modality, and not for the only one. Give it a random generator of its own: PyTorch's is
            put back, so that later draws would repeat the callable's.
        forward: Calls the model with name → input where arguments of these names do not fit, as
            ``lambda x: model(x["audio"], x["visual"])``, or ``model`` for one that takes the
            mapping itself. It should call a DistributedDataParallel's ``.module``.
        output: From what the model returns to the tensor that is wanted, as
            ``lambda out: out.logits``. Without it the model must return a tensor.
        differentiable: True for a loss of these outputs: the passes have gradients then, if the
            caller does, and modules run in their own mode on copies of their buffers. Else they
            have none and run in evaluation mode, as scores should.

    Returns:
        Name → output.

    Raises:
        TypeError: `model` cannot be called, or not with these names; `inputs` does not map names
            to tensors; "mean" of integers; or there is no tensor in the end.
        ValueError: there are no inputs, no such baseline, a baseline of another shape, dtype or
            device than the input's, or the model has not been used yet (lazy).
    """
    check_inputs(model, inputs, baseline)
    flag("differentiable", differentiable)
    for called, module in (("model", model), ("module of forward=", forward)):
        if isinstance(module, nn.Module):
            check_made(called, module)
    alone = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    kind = training if differentiable else scoring
    with passes_through(alone, forward, device_of(alone, inputs), kind):
        masks = masks_of(inputs, baseline)
        return {
            name: called_with(
                alone, forward, output, f"where {name!r} is alone", _only(name, inputs, masks)
            )
            for name in inputs
        }


def check_inputs(model: object, inputs: object, baseline: object) -> None:
    """Raises the errors that `unimodal_outputs` names."""
    if not callable(model):
        hint = " (are model and inputs swapped?)" if isinstance(model, Mapping) else ""
        raise TypeError(
            f"model must be a module or another callable, got {type(model).__name__}{hint}"
        )
    check_instance("model", model)
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must map names to tensors, got {type(inputs).__name__}")
    if not inputs:
        raise ValueError("inputs must hold at least one modality")
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"inputs[{name!r}] is not a tensor but {type(x).__name__}; pass other "
                "arguments to the model in forward="
            )
    if not callable(baseline) and (not isinstance(baseline, str) or baseline not in _BASELINES):
        raise ValueError(
            f"baseline must be one of {', '.join(map(repr, _BASELINES))} or a callable, "
            f"got {baseline!r}"
        )


def device_of(model: object, inputs: Inputs) -> torch.device:
    """The device that the model runs on; inputs may still be on the CPU."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return next(iter(inputs.values())).device if parameter is None else parameter.device


@contextmanager
def passes_through(
    model: Callable[..., Any],
    forward: Callable[..., Any] | None,
    device: torch.device,
    kind: Callable[..., Any],
) -> Iterator[None]:
    """Prepares the model, and whatever else `forward` may call, for the passes."""
    with kind(model, device):
        if forward is None or forward is model:
            yield
        else:
            with kind(forward, device):
                yield


def masks_of(inputs: Inputs, baseline: Baseline) -> dict[str, Tensor]:
    """Name → the input of a modality that is masked; none for the only one."""
    if len(inputs) == 1:
        return {}
    return {name: _mask(name, x, baseline) for name, x in inputs.items()}


def _mask(name: str, x: Tensor, baseline: Baseline) -> Tensor:
    """The input of a modality that is masked."""
    if baseline == "zero":
        return torch.zeros_like(x)
    if baseline == "mean":
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(
                f"inputs[{name!r}] has dtype {x.dtype}, whose mean the model cannot take; give "
                'baseline="zero" or a callable'
            )
        if not x.dim():
            raise ValueError(
                f"inputs[{name!r}] has no batch to take the mean of; give "
                'baseline="zero" or a callable'
            )
        if x.layout is not torch.strided or x.dtype.itemsize < 2:
            kind = x.layout if x.layout is not torch.strided else x.dtype
            raise TypeError(
                f"inputs[{name!r}] is of {kind}, of which PyTorch takes no mean; give "
                'baseline="zero" or a callable'
            )
        return torch.empty_like(x).copy_(x.mean(dim=0, keepdim=True))  # dense, for the model's view
    assert callable(baseline)
    found = baseline(name, x)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the baseline of {name!r} must be a tensor like the input, got {type(found).__name__}"
        )
    if (found.shape, found.dtype, found.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"the baseline of {name!r} must be like the input, {_described(x)}; it is "
            f"{_described(found)}"
        )
    return found


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def _only(name: str, inputs: Inputs, masks: Inputs) -> dict[str, Tensor]:
    return {o: x if o == name else masks[o] for o, x in inputs.items()}


def called_with(
    model: Callable[..., Any],
    forward: Callable[..., Any] | None,
    output: Callable[[Any], Tensor] | None,
    where: str,
    given: dict[str, Tensor],
) -> Tensor:
    """The model's tensor for copies of these inputs, which errors call `where`."""
    for name, function in (("forward", forward), ("output", output)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if isinstance(function, type):
            raise TypeError(f"{name} must be callable on outputs, got the class {function}")
    # A model may change its inputs in place.
    given = {name: x.clone() for name, x in given.items()}
    if forward is not None:
        found = forward(given)
    else:
        try:
            found = model(**given)
        except TypeError as error:
            _check_names(model, given, error)
            raise
    if output is not None:
        found = output(found)
        if not isinstance(found, Tensor):
            raise TypeError(f"output= must return a tensor, got {type(found).__name__}")
    elif not isinstance(found, Tensor):
        raise TypeError(
            f"the model returns {type(found).__name__} {where}, not a tensor: say with output= "
            "which of its tensors is wanted, as output=lambda out: out.logits"
        )
    return found


def _check_names(model: Callable[..., Any], given: Inputs, error: TypeError) -> None:
    """Raises a TypeError where the model has no arguments of these names."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return  # not known, as of some callables in C
    try:
        signature.bind(**given)
    except TypeError as reason:
        raise TypeError(
            f"the model cannot be called with arguments {list(given)}: {reason}; give "
            "forward=, such as lambda x: model(*x.values())"
        ) from error
