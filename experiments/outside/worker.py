"""A process that holds one computation ready and runs it whenever a line asks for it.

Its standard output speaks to ``compare`` only, in lines of JSON: first ``{"versions": ...}`` once
the computation is built and has run, then a row of seconds for every line read. Whatever else is
printed goes to the standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable


def serve(build: Callable[[], Callable[[], object]], versions: dict[str, str]) -> None:
    """Builds, and answers until the input ends.

    Args:
      build: makes the computation; the computation returns when it is done.
      versions: of what computes.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = build()
    run()
    answers.write(json.dumps({"versions": versions}) + "\n")
    for _ in sys.stdin:
        cpu, start = time.process_time(), time.perf_counter()
        run()
        row = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        answers.write(json.dumps(row) + "\n")
