"""Drawing the next step's noise on another core while a gradient is computed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np

from common.privacy.noise import Floats, Stream

DRAWN_AHEAD = 100_000  # from so many normals on, a thread of their own is worth its while
_PIECE = 1 << 15  # normals handed over at a time: they stay in a core's cache


class Cores:
    """Who computes in this process: trainings, and threads that draw noise for them.

    Args:
        count: cores that this process may use. None: those that the system grants it, at most
            OMP_NUM_THREADS where that is set (Ray sets it for its workers); none is free for noise while
            the machine's load of the last minute, other programs included, is as high.
    """

    def __init__(self, count: int | None = None) -> None:
        self._count, self._busy, self._lock = count, 0, threading.Lock()

    @property
    def count(self) -> int:
        if self._count is not None:
            return self._count
        granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        told = os.environ.get("OMP_NUM_THREADS", "")
        return min(granted, int(told)) if told.isdigit() and int(told) > 0 else granted

    @contextmanager
    def working(self) -> Iterator[None]:
        """Take one core for a training, free or not."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            self.give_back()

    def borrow(self) -> bool:
        """Take one more if it is free; say whether it was."""
        with self._lock:
            free = self._busy < self.count and not self._crowded()
            self._busy += free
            return free

    def give_back(self) -> None:
        """Be done with one."""
        with self._lock:
            self._busy -= 1

    def _crowded(self) -> bool:
        if self._count is not None:
            return False
        try:
            return os.getloadavg()[0] >= self.count
        except (AttributeError, OSError):  # the system doesn't tell
            return False


CORES = Cores()


class DrawnAhead:
    """A stream's normals, the next of which a thread may be drawing. Made by `drawn_ahead`."""

    def __init__(self, stream: Stream, count: int, cores: Cores, scale: float) -> None:
        self._stream, self._count, self._cores, self._scale = stream, count, cores, scale
        self._drawn: Floats = np.empty(0)
        self._thread: threading.Thread | None = None
        # Two queues and no executor: what one step costs in those, thousands pay
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._pending = False

    def begin(self) -> None:
        """Start to draw the next `count` normals, if that pays and a core is free; returns at once."""
        if self._count < DRAWN_AHEAD or self._pending or not self._cores.borrow():
            return
        if self._thread is None:
            try:
                self._drawn = np.empty(self._count)
                thread = threading.Thread(target=self._draw, name="noise", daemon=True)
                thread.start()
            except BaseException:
                self._cores.give_back()
                raise
            self._thread = thread
        self._pending = True
        self._wanted.put(True)

    def normals(self, count: int, scale: float = 1.0) -> Iterator[Floats]:
        """The stream's own normals, whoever drew them.

        Raises:
            ValueError: if other than the number begun is taken, or at another scale.
        """
        if not self._pending:
            yield from self._stream.normals(count, scale)
            return
        error = self._done.get()
        self._pending = False  # not before: else who stops waiting finds the next one's noise done
        if error is not None:
            raise error
        if count != self._count:
            raise ValueError(f"{self._count} normals were begun, and {count} are taken")
        if self._scale not in (1.0, scale):
            raise ValueError(f"normals were begun at scale {self._scale}, and are taken at {scale}")
        for start in range(0, count, _PIECE):
            piece = self._drawn[start : start + _PIECE]
            if self._scale != scale:
                piece *= scale
            yield piece

    def close(self) -> None:
        """Wait for the thread, and end it."""
        if self._thread is not None:
            self._wanted.put(False)
            self._thread.join()

    def _draw(self) -> None:
        """What the thread does until it is told to end."""
        while self._wanted.get():
            error: BaseException | None = None
            try:
                self._stream.fill(self._drawn, self._scale)
            except BaseException as caught:  # raised where the normals are used
                error = caught
            self._cores.give_back()
            self._done.put(error)


@contextmanager
def drawn_ahead(
    stream: Stream, count: int, cores: Cores = CORES, *, scale: float = 1.0
) -> Iterator[DrawnAhead]:
    """For one training: between `begin` and use, another core draws the next `count` normals.

    Only if they are `DRAWN_AHEAD` or more and a core is free (see `Cores`): each training in this process
    counts as one that is busy, and so does each thread that draws, so that a simulation's workers keep
    theirs. The numbers are the same either way. The thread ends with the context; an error on it is
    raised where the normals are used.

    Args:
        scale: what the normals will be multiplied by, such as the noise's standard deviation; the thread does
            that too. 1: whoever takes them does it.
    """
    with cores.working():
        ahead = DrawnAhead(stream, count, cores, scale)
        try:
            yield ahead
        finally:
            ahead.close()
