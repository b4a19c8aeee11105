"""Settled before any test imports PyTorch."""

import os
import signal

# Threads that spin for work slow a test down many times where other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Commands that tests interrupt must not inherit that Ctrl-C is ignored, as in what a shell runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
