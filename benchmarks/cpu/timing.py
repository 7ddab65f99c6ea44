"""Times of two functions that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(
    a: Callable[[], object], b: Callable[[], object], seconds: float
) -> tuple[float, float]:
    """Medians in ms of two functions called in turn for about `seconds`, at least three times."""
    times: tuple[list[float], list[float]] = ([], [])
    for f in (a, b):
        f()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[1]) < 3:
        for f, log in zip((a, b), times, strict=True):
            start = time.perf_counter()
            f()
            log.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def alone(f: Callable[[], object], seconds: float) -> float:
    """Median in ms."""
    return interleaved(f, lambda: None, seconds)[0]
