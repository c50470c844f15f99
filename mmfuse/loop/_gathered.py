"""Parameters that FSDP2 has gathered: other objects, in the place of those that are trained.

A pass without a backward pass leaves them gathered where `fully_shard` does not shard them again
after a forward pass, as it does not in the module that is called first.
"""

from __future__ import annotations

import sys

from torch import nn

from .shards import is_dtensor


def shard_again(module: nn.Module) -> None:
    """Puts the parameters back that are trained, which hold what optimizers have written.

    The unit of `fully_shard` may be a module around this one, which cannot be found from here. Its
    hooks can: before it tells its state, a module shards its parameters.
    """
    module.state_dict()


def shard_if_gathered(module: nn.Module) -> None:
    """The same where a module of `fully_shard` has a parameter that is none of those."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    flat = getattr(fsdp, "FullyShardedDataParallel", ())  # FSDP1 would gather, and is refused
    gathered = not all(map(is_dtensor, module.parameters()))
    if gathered and not any(isinstance(each, flat) for each in module.modules()):
        shard_again(module)
