"""all_words.py: the fast functions of the noise against its contract, in the host shim."""

from __future__ import annotations

import subprocess
from pathlib import Path

import all_words
import pytest
from all_words import Found
from processes import cuda_tool

# The stride does not divide 2^32, so that the low bits vary, too.
STRIDE = 65_537


def test_in_the_shim(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = all_words.in_shim(STRIDE)
    except RuntimeError as error:
        pytest.skip(f"the CUDA host shim does not build: {error}")
    assert found.words == -(-(2**32) // STRIDE)
    assert found.good(STRIDE)
    # The reference rounds u, the kernel does not: no angle can be better than that.
    assert 1e-7 < found.angle < 2e-6
    assert 1e-7 < found.radius < 1e-5
    # A pair that was drawn is no worse than the worst pair that there could be.
    assert 0.05 < found.contract <= found.any_partner
    assert all_words.main(["--device", "cpu", "--stride", str(STRIDE)]) == 0
    assert f"all_words: {found}" in capsys.readouterr().out


def test_what_is_good() -> None:
    whole = Found(2.0**32, 0.4, 0.7, 1e-6, 3e-6)
    assert whole.good(1)
    assert not whole._replace(words=2.0**32 - 1).good(1)
    for bad in (1.01, float("inf")):
        assert not whole._replace(contract=bad).good(1)
        assert not whole._replace(any_partner=bad).good(1)


def test_what_is_outside_the_contract_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(all_words, "in_shim", lambda _: Found(2.0**32, 1.2, 1.3, 1e-6, 3e-6))
    assert all_words.main(["--device", "cpu"]) == 1
    assert "at most 120.0% of what the contract allows" in capsys.readouterr().out


def test_without_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert all_words.main(["--output", str(tmp_path)]) == 77
    assert "skipped, because nvcc was not found" in capsys.readouterr().out


def test_nvcc_compiles_it(tmp_path: Path) -> None:
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    root = Path(__file__).resolve().parents[2]
    command = [nvcc, "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings"]
    command += [f"-I{root / 'csrc'}", str(all_words.SOURCE)]
    command += ["-o", str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "program").is_file()
