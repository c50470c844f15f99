"""Finds the encoders that the methods take by names, as a configuration file holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from ._parameters import Encoder

#: The ways to name a modality's parameters: a module, parameters, or patterns of their names.
Named = Encoder | str | Sequence[str]

# Children of wrappers: torch.compile, FullyShardedDataParallel, activation checkpointing.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# These call their child "module", as a network of its own may too.
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_GLOB = frozenset("*?[")


def match_parameters(model: nn.Module, encoders: Mapping[str, Named]) -> dict[str, Encoder]:
    """Finds the encoders in a model by name.

    ::

        encoders = mmfuse.match_parameters(
            model, {"audio": "audio_net", "visual": ["visual_net.layer*.weight", "visual_proj"]}
        )
        ogm = mmfuse.OGM(encoders)

    Names are those of ``model.named_modules()`` and ``model.named_parameters()``, with or without
    what `DistributedDataParallel`, `torch.compile`, FSDP and activation checkpointing put into
    them. Call this after whatever replaces parameters, as `fully_shard` does.

    Args:
        model: The model that has the encoders.
        encoders: Name of the modality → the encoder itself (a module, or an iterable of
            parameters), or one or several patterns: the name of a module, which stands for all of
            it; the name of a parameter; or a glob over the names of parameters, in which ``*`` also
            stands for dots.

    Returns:
        Name of the modality → what the methods take: the module where one name of a module was
        given, otherwise its parameters in the model's order, each once.

    Raises:
        TypeError: an encoder is none of these.
        ValueError: patterns match nothing; all of them are named, each with the names next to it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if not isinstance(encoders, Mapping):
        raise TypeError(f"encoders must map names to patterns, got {type(encoders).__name__}")
    asked = {name: _patterns(name, value) for name, value in encoders.items()}
    if not any(patterns for patterns, _ in asked.values()):
        return {name: _given(given) for name, (_, given) in asked.items()}
    names = _Names(model)
    found: dict[str, Encoder] = {}
    unmatched = []
    for name, (patterns, given) in asked.items():
        if not patterns:
            found[name] = _given(given)
            continue
        matches = [names.match(pattern) for pattern in patterns]
        unmatched += [
            f"encoders[{name!r}]: {pattern!r} {names.why(pattern)}"
            for pattern, match in zip(patterns, matches, strict=True)
            if match is None
        ]
        found[name] = names.together([match for match in matches if match is not None])
    if unmatched:
        raise ValueError("\n".join(unmatched))
    return found


def _patterns(name: str, value: Named) -> tuple[list[str], Encoder | None]:
    """Either patterns or an encoder; a generator, which can be read once, as a list."""
    if isinstance(value, str):
        return [value], None
    if isinstance(value, nn.Module):
        return [], value
    prefix = f"encoders[{name!r}]"
    if isinstance(value, (Tensor, Mapping, bytes)) or not isinstance(value, Iterable):
        raise TypeError(
            f"{prefix} must be a module, an iterable of parameters, or one or several patterns of "
            f"their names, got {type(value).__name__}"
        )
    tensors: list[Tensor] = []
    patterns: list[str] = []
    for i, item in enumerate(value):
        if isinstance(item, str):
            patterns.append(item)
        elif isinstance(item, Tensor):
            tensors.append(item)
        else:
            raise TypeError(
                f"{prefix}[{i}] is neither a parameter nor a pattern but {type(item).__name__}"
            )
    if patterns and tensors:
        raise TypeError(f"{prefix} mixes parameters and patterns; give one or the other")
    return patterns, tensors


def _given(encoder: Encoder | None) -> Encoder:
    assert encoder is not None
    return encoder


class _Named(NamedTuple):
    """A module or a parameter, under its name without and with the wrappers' parts."""

    plain: str
    full: str
    what: nn.Module | Tensor


class _Names:
    """All names of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = type(model).__name__
        entries = list(_walk(model, "", ""))
        # The first of one name is the outermost wrapper, the one that must be called.
        self.modules = _by_name([e for e in entries if isinstance(e.what, nn.Module) and e.plain])
        self.parameters = [e for e in entries if isinstance(e.what, Tensor)]
        self._by_parameter = _by_name(self.parameters)

    def match(self, pattern: str) -> nn.Module | list[Tensor] | None:
        """The parameters that a pattern stands for; None if there are none."""
        for variant in _variants(pattern):
            match = self._exactly(variant)
            if match is not None:
                return match
        return None

    def _exactly(self, pattern: str) -> nn.Module | list[Tensor] | None:
        if not _GLOB.intersection(pattern):
            known = self.modules.get(pattern) or self._by_parameter.get(pattern)
            if known is None:
                return None
            if isinstance(known.what, Tensor):
                return [known.what]
            return known.what if any(True for _ in known.what.parameters()) else None
        found = [e.what for e in self.parameters if fnmatchcase(e.plain, pattern)]
        found = found or [e.what for e in self.parameters if fnmatchcase(e.full, pattern)]
        return [p for p in found if isinstance(p, Tensor)] or None

    def together(self, matches: Sequence[nn.Module | list[Tensor]]) -> Encoder:
        """One module as it is; otherwise the parameters in the model's order, each once."""
        if len(matches) == 1 and isinstance(matches[0], nn.Module):
            return matches[0]
        chosen: set[int] = set()
        for match in matches:
            own = match.parameters() if isinstance(match, nn.Module) else match
            chosen.update(map(id, own))
        # A dict, since tied weights have several names.
        return list(
            {
                id(e.what): e.what
                for e in self.parameters
                if isinstance(e.what, Tensor) and id(e.what) in chosen
            }.values()
        )

    def why(self, pattern: str) -> str:
        """Why a pattern matches nothing, and what is next to it."""
        if pattern in self.modules:
            return f"is a module of {self.model} without parameters"
        if _GLOB.intersection(pattern):
            if any(fnmatchcase(name, pattern) for name in self.modules):
                return (
                    f"matches modules of {self.model} but none of its parameters, whose names a "
                    f"glob is for; try {pattern + '.*'!r}"
                )
            text = f"matches no parameter of {self.model}"
        else:
            text = f"is no module or parameter of {self.model}"
        names = [*self.modules, *self._by_parameter]
        near = get_close_matches(pattern, dict.fromkeys(names), n=3)
        return f"{text}; did you mean {' or '.join(map(repr, near))}?" if near else text


def _walk(module: nn.Module, plain: str, full: str) -> Iterator[_Named]:
    """All modules and parameters, in the order of `named_parameters`, tied ones repeatedly."""
    yield _Named(plain, full, module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _Named(_join(plain, name), _join(full, name), parameter)
    for name, child in module._modules.items():
        if child is not None:
            wraps = name in _WRAPPED or (name == "module" and isinstance(module, _PARALLEL))
            yield from _walk(child, plain if wraps else _join(plain, name), _join(full, name))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _by_name(entries: Sequence[_Named]) -> dict[str, _Named]:
    """The first entry of each name; a name without wrappers comes before one with them."""
    names: dict[str, _Named] = {}
    for entry in entries:
        names.setdefault(entry.plain, entry)
    for entry in entries:
        names.setdefault(entry.full, entry)
    return names


def _variants(pattern: str) -> list[str]:
    """The pattern, and what it is without the wrappers that its author may have had."""
    parts = pattern.split(".")
    unwrapped = [part for part in parts if part not in _WRAPPED]
    bare = [part for part in unwrapped if part != "module"]
    return list(dict.fromkeys(".".join(p) for p in (parts, unwrapped, bare) if p))
