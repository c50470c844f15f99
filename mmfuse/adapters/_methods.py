"""The methods that the adapters take."""

from __future__ import annotations

from ..loop.gradients import GradientMethod
from ..methods.catalogue import METHODS

# A framework's own backward pass suffices for those that need logits.
_NAMES = ", ".join(
    name
    for name, made in METHODS.items()
    if made.card.acts == "gradient" and "logits" in made.card.needs
)


def checked(method: object) -> GradientMethod:
    """The method, if it acts on gradients.

    Raises:
        TypeError: it does not, as those that act in the forward pass; or it makes the backward
            passes itself.
    """
    if not isinstance(method, GradientMethod):
        raise TypeError(
            f"expected a method that acts on gradients ({_NAMES}), got {type(method).__name__}"
        )
    if method.rule.need.second == "unimodal":
        raise TypeError(
            f"{method.name} makes its two backward passes itself, where the framework makes one; "
            f"call {method.name}.backward(loss, unimodal_losses=...) in a training loop of your own"
        )
    return method
