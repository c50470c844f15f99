"""Counts the parameters and modules that are registered anywhere, so that surgery is seen.

To walk through a user's encoders in every step would take longer than the step; a registration is
rare, and PyTorch tells of it.
"""

from __future__ import annotations

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

#: How many there have been in this process, from the first object that asks on.
registrations = 0
_watching = False


def watch() -> int:
    """Begins to count; returns the number so far."""
    global _watching
    if not _watching:
        _watching = True
        register_module_parameter_registration_hook(_count)
        register_module_module_registration_hook(_count)
    return registrations


def _count(*_: object) -> None:
    global registrations
    registrations += 1
