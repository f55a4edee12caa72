"""The state of a process that vLLM takes for its own: random states, threads, the GPU, the exception hook."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = ["preserve_process_state", "quiet_children", "without_main_script"]

QUIET = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Put back what vLLM changes in a process that it takes for its own: random states, threads, the GPU, the exception hook.

    Warnings are its own too; what matters of them is raised as an error.
    """
    import numpy as np
    import torch  # the module itself: one of its functions is put back

    threads, set_threads, hook = torch.get_num_threads(), torch.set_num_threads, sys.excepthook
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads = set_threads  # vLLM puts one there that does nothing
            torch.set_num_threads(threads)
            for device in devices:
                torch.cuda.set_device(device)  # an engine leaves its own one there
            sys.excepthook = hook
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def without_main_script() -> Iterator[None]:
    """Let processes that are spawned here not run the user's main script again, as multiprocessing has it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def quiet_children() -> Iterator[None]:
    """Let processes that are started here keep their libraries' warnings to themselves."""
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update(QUIET)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
