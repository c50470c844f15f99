"""What the adapters share: which methods they take."""

from __future__ import annotations

from ..loop.gradients import GradientMethod


def checked(method: object) -> GradientMethod:
    """The method, if it acts on gradients.

    Raises:
        TypeError: it does not, as those that act in the forward pass; or it makes the backward
            passes itself.
    """
    if not isinstance(method, GradientMethod):
        raise TypeError(
            "expected a method that acts on gradients (OGM, InfoReg, RedReg), got "
            f"{type(method).__name__}"
        )
    if method.rule.need.second == "unimodal":
        raise TypeError(
            f"{method.name} makes its two backward passes itself, where the framework makes one; "
            f"call {method.name}.backward(loss, unimodal_losses=...) in a training loop of your own"
        )
    return method
