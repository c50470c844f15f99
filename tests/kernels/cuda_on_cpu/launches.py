"""Contents and launches of the shim's libraries: kernels, shared variables, the order."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .build import CSRC, build_kernels

SOURCES = tuple(sorted([*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").rglob("*.h")]))

# Within the parentheses of __launch_bounds__ there may be another pair.
_KERNEL = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\s*\("
)
_SHARED = re.compile(r"^(?!.*\bextern\b).*\b__shared__\b[^;]*?(\w+)(?:\[[^\]]*\])*;", re.MULTILINE)
_MOST_KERNELS = 4096


def declared(sources: tuple[Path, ...], qualifier: str) -> Counter[str]:
    """Names that the sources declare `__global__` or `__shared__`, and how often.

    Raises:
        ValueError: the qualifier stands somewhere where no name was found.
    """
    pattern = {"__global__": _KERNEL, "__shared__": _SHARED}[qualifier]
    names: Counter[str] = Counter()
    for source in sources:
        code = re.sub(r"//.*", "", source.read_text())
        found = pattern.findall(code)
        used = len(re.findall(rf"(?<!extern )\b{qualifier}\b", code))
        if used != len(found):
            raise ValueError(f"{source.name}: {used} {qualifier}, but the names {found}")
        names.update(found)
    return names


def short_name(symbol: str) -> str:
    """A demangled function without its return type, its arguments and mmfuse's namespaces."""
    symbol = re.sub(r"\(anonymous namespace\)::|mmfuse::cuda::|^void ", "", symbol)
    return re.sub(r"\((\w+)\)(\d)", r"\1 \2", symbol).split("(")[0]


class Shim:
    """One of the libraries that build.py makes.

    Args:
        path: Of the library.
        sources: Its kernels' files.
    """

    def __init__(self, path: Path, sources: tuple[Path, ...]) -> None:
        self._library = ctypes.CDLL(str(path))
        self._symbols = _symbols(path)
        self._kernel_names = declared(sources, "__global__")
        self._shared_names = declared(sources, "__shared__")
        known = ctypes.cast(self._library.shim_launches, ctypes.c_void_p).value
        (offset,) = (a for a, _, _, name in self._symbols if name == "shim_launches")
        assert known is not None
        self._base = known - offset

    def kernels(self) -> dict[int, str]:
        """Address and name, template arguments included, of every kernel in the library."""
        names = {
            self._base + address: short_name(name)
            for address, _, kind, name in self._symbols
            if kind in "tTwW" and "[clone" not in name
        }
        return {a: n for a, n in names.items() if n.split("<")[0] in self._kernel_names}

    def launches(self) -> Counter[str]:
        """How often each kernel has been launched so far."""
        return Counter({name: count for name, (count, _) in self._launched().items()})

    def most_shared(self) -> dict[str, int]:
        """The most bytes of dynamic shared memory that each kernel has been launched with."""
        return {name: most for name, (_, most) in self._launched().items()}

    def _launched(self) -> dict[str, tuple[int, int]]:
        addresses = (ctypes.c_void_p * _MOST_KERNELS)()
        counts, shared = (ctypes.c_uint64 * _MOST_KERNELS)(), (ctypes.c_uint64 * _MOST_KERNELS)()
        self._library.shim_launches.restype = ctypes.c_size_t
        capacity = ctypes.c_size_t(_MOST_KERNELS)
        used = self._library.shim_launches(addresses, counts, shared, capacity)
        assert used <= _MOST_KERNELS
        names = self.kernels()
        return {names[addresses[i]]: (counts[i], shared[i]) for i in range(used)}

    def forget_permissions(self) -> None:
        """Takes back the dynamic shared memory that kernels have asked for so far."""
        self._library.shim_forget_permissions()

    def set_order(self, order: str, seed: int = 0) -> None:
        """Sets which block and thread goes first: "forward", "reverse" or "random"."""
        assert order in ("forward", "reverse", "random")
        self._library.shim_set_order(order.encode(), ctypes.c_uint32(seed))

    def poison_shared(self, on: bool, byte: int = 0xFF) -> int:
        """Fills `__shared__` variables and stacks before each block; returns how many variables.

        Args:
            on: Or not at all, but for dynamic shared memory, which is always filled.
            byte: The byte to fill them with; the default makes NaN.
        """
        self._library.shim_set_poison(ctypes.c_int(byte), ctypes.c_bool(on))
        variables = [
            (self._base + address, size)
            for address, size, kind, name in self._symbols
            if kind in "bBu" and ")::" in name and name.split("::")[-1] in self._shared_names
        ]
        used = variables if on else []
        addresses = (ctypes.c_void_p * len(used))(*(a for a, _ in used))
        sizes = (ctypes.c_size_t * len(used))(*(s for _, s in used))
        self._library.shim_poison_shared(addresses, sizes, ctypes.c_size_t(len(used)))
        return len(variables)


def _symbols(path: Path) -> list[tuple[int, int, str, str]]:
    """Offset, size, nm's kind and demangled name of what a library defines."""
    command = ["nm", "-C", "-S", "--defined-only", str(path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = []
    for line in listed.splitlines():
        found = re.match(r"([0-9a-f]+) ([0-9a-f]+) (\w) (.*)", line)
        if found is not None:
            offset, size, kind, name = found.groups()
            symbols.append((int(offset, 16), int(size, 16), kind, name))
    return symbols


def kernels_shim() -> Shim:
    """The library of csrc/cuda."""
    return Shim(build_kernels(), SOURCES)


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Yields a counter that holds, after the block, the launches of each kernel in the block."""
    shim = kernels_shim()
    before = shim.launches()
    counts: Counter[str] = Counter()
    yield counts
    counts.update(shim.launches() - before)
