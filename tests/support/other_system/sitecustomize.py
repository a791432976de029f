"""Python without what it does not have on Windows: read at each interpreter's start where this folder stands in PYTHONPATH.

What libraries look for on Linux without asking (resource, termios, SIGCHLD) stays."""

import multiprocessing
import os
import signal
import sys

sys.modules["fcntl"] = None  # type: ignore[assignment]
for module, names in {os: "fork getloadavg killpg posix_fallocate pread sched_getaffinity", signal: "SIGUSR1 pthread_sigmask"}.items():
    for name in names.split():
        delattr(module, name)
multiprocessing.set_start_method("spawn")
