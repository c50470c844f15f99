"""Triton kernels. With ``TRITON_INTERPRET=1`` set before the import they run on CPU tensors."""

from __future__ import annotations


def _interprets() -> bool:
    try:
        import triton.language
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return False
    # Triton's own device functions tell what was set when Triton itself was imported.
    return isinstance(triton.language.cdiv, InterpretedFunction)


INTERPRETED: bool = _interprets()


def active_target() -> str | None:
    """The kind of device for which Triton compiles here, such as "cuda"; None for none."""
    try:
        from triton.runtime import driver

        return str(driver.active.get_current_target().backend)
    except Exception:  # its drivers raise what they like where there is no such device
        return None
