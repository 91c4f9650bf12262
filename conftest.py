"""Environment that must be set before anything imports triton: this file is the first one pytest loads."""

from __future__ import annotations

import os
from pathlib import Path

# Without a GPU the Triton kernels can only be interpreted, and triton reads this once, when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two test workers on two cores: one thread each, or they fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
