"""The version, as the build has written it; neither git nor installed metadata is asked."""

import json
from pathlib import Path


def _built() -> str:
    try:
        notes = json.loads(Path(__file__).with_name("_build.json").read_text(encoding="utf-8"))
        return str(notes["version"])
    except (OSError, ValueError, KeyError):
        return "0+unknown"  # a checkout in which nothing was built


__version__ = _built()
