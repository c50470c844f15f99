"""How kernels are compiled, at a launch or ahead of time without a GPU."""

from __future__ import annotations

from typing import Any

# Said aloud, because Triton's default depends on its version.
COMPILE_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
# Of kernels that compare: with one of its products fused, a·b - a·b is a rounding error, not 0.
COMPARING_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
