"""Keeping a worker to the one processor core that it was given."""

from __future__ import annotations

import os

from threadpoolctl import threadpool_limits

__all__ = ["use_one_thread"]

_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def use_one_thread() -> None:
    """Let BLAS and OpenMP in this process work in one thread, those loaded already and those to come.

    There is a process per core already; more threads inside each would only fight for the cores. ITK and Blosc are told
    where they are called.
    """
    for variable in _VARIABLES:
        os.environ[variable] = "1"
    threadpool_limits(limits=1)
