"""The type of what the examples of each operator are made from."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: Standard normal float32 numbers of a shape, others in every call.
Normal = Callable[..., Tensor]
