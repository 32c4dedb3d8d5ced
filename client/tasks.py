"""What a request waits for: the training and the evaluation of a model, which many sites may do together."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from client.training import Trainer
from common.messages import Arrays
from common.privacy.noise import Stream


@dataclass(frozen=True)
class Training:
    """The training that a request waits for.

    Attributes:
        parameters: the global model.
        streams: gives the streams of sampling and of noise, each time from their beginning: an attempt that
            failed has used up some of them, and nothing of it has left.
    """

    trainer: Trainer
    parameters: Arrays
    streams: Callable[[], tuple[Stream, Stream]]

    def alone(self) -> Arrays:
        """The update, trained by this site's trainer alone."""
        return self.trainer.train(self.parameters, *self.streams())


@dataclass(frozen=True)
class Evaluation:
    """The evaluation that a request waits for.

    Attributes:
        parameters: the global model.
        bins: see `common.metrics.histograms`.
    """

    trainer: Trainer
    parameters: Arrays
    bins: int

    def alone(self) -> Arrays:
        """The exact histograms, by this site's trainer alone."""
        return self.trainer.evaluate(self.parameters, self.bins)


Task = Training | Evaluation
Working = Generator[Task, Arrays, bytes]
"""A request under way: yields what is to be done, is sent what came of it (or thrown what went wrong), and
returns the answer."""


def tried(task: Task) -> Arrays | Exception:
    """The task done alone, or what went wrong with it."""
    try:
        return task.alone()
    except Exception as error:
        return error


def finished(working: Working) -> bytes:
    """Bring a request to its end, each task alone; returns its answer."""
    try:
        task = next(working)
        while True:
            try:
                found = task.alone()
            except BaseException as error:
                task = working.throw(error)
            else:
                task = working.send(found)
    except StopIteration as end:
        answer: bytes = end.value
    return answer
