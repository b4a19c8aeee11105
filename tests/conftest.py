"""Settled before any test imports PyTorch."""

import os

# Threads that spin for work slow a test down many times where other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
