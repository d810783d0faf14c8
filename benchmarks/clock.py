"""A clock for models: a process that never trains, in which they take turns.

The allocator of a process that has trained holds memory which is taken anew elsewhere for every large tensor, so that
nets of many tensors seem quicker there than they are where they are used.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from harness import in_turns
from torch import Tensor, nn

TURN = 0.005  # seconds that the first model's turn takes at least


def processes(count: int, threads: int) -> ProcessPoolExecutor:
    """Processes that begin with nothing, and end when this one does.

    Args:
        count: How many.
        threads: Of each.
    """
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (threads,))


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Whatever ended it.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Clock:
    """The process; inside ``with`` it runs.

    Args:
        threads: Of it; None for as many as here.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._process = processes(1, threads or torch.get_num_threads())

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def seconds(self, models: Mapping[Any, nn.Module], x: Tensor, rounds: int) -> dict[Any, list[float]]:
        """Seconds that each model takes for a batch in each round, in evaluation, a first round left out.

        Args:
            models: Of plain torch modules, by any name.
            x: A batch; one of images (n, channels, height, width) lies as kernels like it.
            rounds: How often they take turns.
        """
        return self._process.submit(_seconds, dict(models), x, rounds).result()


@torch.inference_mode()
def _seconds(models: dict[Any, nn.Module], x: Tensor, rounds: int) -> dict[Any, list[float]]:
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    for model in models.values():
        model.eval().to(memory_format=torch.channels_last)
    actions = {name: functools.partial(model, x) for name, model in models.items()}
    first = next(iter(actions))
    seconds = in_turns({first: actions[first]}, rounds=1)[first][0]
    return in_turns(actions, rounds, repeats=max(1, round(TURN / seconds)))
