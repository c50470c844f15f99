"""A busy neighbour: processes that keep all cores busy while something is timed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import TracebackType

# Ends by itself if the process that started it is gone.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**6))"
# Until all of them run.
_START_S = 0.1


class BusyNeighbour:
    """Runs one spinning process for each core while the context lasts."""

    def __enter__(self) -> BusyNeighbour:
        command = [sys.executable, "-S", "-c", _SPIN]
        self.processes = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
        time.sleep(_START_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(timeout=10)
