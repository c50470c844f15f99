"""make sanitize names its requirements; CI runs the rest of it."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "sanitize.py"


def test_without_the_sanitizers_there_is_one_sentence() -> None:
    environment = {**os.environ, "CXX": "true"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "make sanitize needs git, and GCC with libasan and libubsan\n"
