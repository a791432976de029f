"""What of this machine the process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """The processor cores that this process may run on; all of them where the system does not say (macOS)."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
