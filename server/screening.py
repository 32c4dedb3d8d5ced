"""Looks at each answer before it may touch the model: what is wrong is set aside, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from common.cells import sound
from common.errors import MessageError
from common.histograms import EXACT_BINS, histogram_shapes
from common.messages import STATISTICS_ROUND, Arrays, Job, Refusal, Reply, all_finite, decode
from common.statistics import layout
from common.study import Study

LARGEST_WEIGHT = 1_000_000_000


def screened(content: bytes, job: Job, study: Study) -> Reply | Refusal:
    """A site's answer, if it answers `job` and could have come from an honest site.

    Raises:
        MessageError: saying what is wrong: not a message, another round's, odd names, shapes or types,
            NaN or infinity, or an update of what is frozen.
    """
    message = decode(content)
    if isinstance(message, Refusal):
        return message
    if not isinstance(message, Reply):
        raise MessageError("a job instead of a reply", remedy="update the site's software")
    header, asked = message.header, job.header
    if (header.session, header.round, header.study) != (asked.session, asked.round, asked.study):
        raise MessageError("the reply belongs to another round", remedy="update the site's software")
    if header.weight > LARGEST_WEIGHT:
        raise MessageError(f"a weight of {header.weight}", remedy="check the site's public size")
    statistics = asked.round == STATISTICS_ROUND
    trains = not statistics and asked.round <= study.algorithm.rounds
    _same_arrays(message.update, job.parameters if trains else {}, "update")
    frozen = [n for n in message.update if study.model.freezes(n)] if study.model.frozen else []
    if any(message.update[name].any() for name in frozen):
        raise MessageError("an update of what the study freezes", remedy="update the site's software")
    # A site whose policy keeps its evaluation answers without metrics.
    evaluates = study.evaluates_in(asked.round) and bool(message.metrics)
    exact = asked.metrics == "exact" or not study.private
    if header.exact != (evaluates and exact):
        raise MessageError("metrics with other noise than was asked for", remedy="update the site's software")
    costs = (study.private and trains, study.private and evaluates and not exact, statistics)
    if tuple(e is not None for e in (header.training, header.evaluation, header.statistics)) != costs:
        raise MessageError("a reply that hides what it cost", remedy="update the site's software")
    shapes = histogram_shapes(study, EXACT_BINS if exact else study.evaluation.bins) if evaluates else {}
    if statistics:
        shapes = layout(study)
    if not (sound(message.metrics, shapes) if exact and evaluates else _whole(message.metrics, shapes)):
        raise MessageError("metrics of an unexpected shape or type", remedy="update the site's software")
    _finite(message.metrics, "metrics")
    return message


def _whole(found: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return found.keys() == shapes.keys() and all(
        found[n].shape == shape and found[n].dtype == np.float64 for n, shape in shapes.items()
    )


def _same_arrays(found: Arrays, expected: Arrays, what: str) -> None:
    if found.keys() != expected.keys() or not all(
        found[n].shape == a.shape and found[n].dtype == a.dtype for n, a in expected.items()
    ):
        raise MessageError(
            f"{what} whose names, shapes or types aren't the model's", remedy="update the site's software"
        )
    _finite(found, what)


def _finite(arrays: Arrays, what: str) -> None:
    if not all_finite(arrays):
        raise MessageError(f"{what} with NaN or infinity", remedy="lower the study's learning rate")
