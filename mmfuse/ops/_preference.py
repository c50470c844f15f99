"""The backend that an op runs on if the caller names none."""

from __future__ import annotations

# The order in which the backends are tried, per device type. All other types have the reference.
PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "xpu": ("triton", "reference"),
}

# Ops that were faster with Triton on the GPUs of benchmarks/results, as `python
# benchmarks/choose.py` finds them there; a test compares. Empty: no GPU has been measured yet.
TRITON_FIRST: frozenset[str] = frozenset()


def preferred(op: str, device_type: str) -> tuple[str, ...]:
    """The backends for tensors on a kind of device, the best one first."""
    order = PREFERENCE.get(device_type, ("reference",))
    if op in TRITON_FIRST and "triton" in order:
        return ("triton", *(backend for backend in order if backend != "triton"))
    return order
