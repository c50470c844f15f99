"""Balanced multimodal training on wrist movements: a smartwatch's accelerometer and gyroscope.

The recordings are real and simultaneous, and the people of the test are none of the training::

    pip install -e ".[examples]"
    pip install --no-deps seglearn==1.2.5
    python examples/wrist.py --seeds 5
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from demonstrations.show import checked, demonstrate, parser
from demonstrations.tasks import TASKS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    task = TASKS["wrist"]
    return demonstrate(task, checked(parser(__doc__, task.views), "wrist", argv))


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks this small are not worth sharing out among threads
    sys.exit(main())
