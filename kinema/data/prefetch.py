"""Batches read before they are asked for, by threads. What comes next is guessed; a wrong guess costs time only."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(samples)`, with the batches after the one asked for in the making.

    Batches of a run are evenly spaced: those of a rank's passes and steps are all as far apart as its first two. The
    last few stay, as several turns of a step ask for the same.
    """

    def __init__(self, make: Callable[[tuple[int, ...]], T], depth: int = 4, threads: int = 2):
        self._make, self._depth = make, depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        self._made: OrderedDict[tuple[int, ...], Future[T]] = OrderedDict()
        self._before: int | None = None
        self._step = 0

    def __call__(self, samples: Sequence[int]) -> T:
        wanted = tuple(samples)
        future = self._begun(wanted)
        if self._before is not None and wanted[0] > self._before:
            self._step = wanted[0] - self._before
        self._before = wanted[0]
        if self._step:
            for ahead in range(1, self._depth + 1):
                self._begun(tuple(n + ahead * self._step for n in wanted))
        return future.result()

    def _begun(self, samples: tuple[int, ...]) -> "Future[T]":
        future = self._made.pop(samples, None) or self._pool.submit(self._make, samples)
        self._made[samples] = future
        while len(self._made) > 2 * self._depth + 2:
            self._made.popitem(last=False)[1].cancel()
        return future
