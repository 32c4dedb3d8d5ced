"""How updates become the next global model. An algorithm is a value with two functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.messages import Arrays
from common.study import Algorithm


@dataclass(frozen=True)
class Update:
    """Attributes:
    weight: public training size of the site.
    delta: local minus global parameters.
    """

    site: str
    weight: int
    delta: Arrays


@dataclass(frozen=True)
class FederatedAlgorithm:
    """Attributes:
    init: parameters → state (arrays, kept in the checkpoint).
    apply: state, parameters, updates → state, parameters. Pure.
    """

    init: Callable[[Arrays], Arrays]
    apply: Callable[[Arrays, Arrays, Sequence[Update]], tuple[Arrays, Arrays]]


def fedavg(server_learning_rate: float = 1.0) -> FederatedAlgorithm:
    """Mean of the updates weighted by public sizes (McMahan et al. 2017).

    Sums in float64 in the order of the sites' names, so that the result doesn't depend on who
    answered first.
    """

    def apply(state: Arrays, parameters: Arrays, updates: Sequence[Update]) -> tuple[Arrays, Arrays]:
        ordered = sorted(updates, key=lambda u: u.site)
        total = sum(u.weight for u in ordered)
        mean = np.zeros(sum(value.size for value in parameters.values()))
        share = np.empty_like(mean)  # of one site; everything in one piece, for small arrays cost calls
        for update in ordered:
            np.concatenate([update.delta[name] for name in parameters], axis=None, out=share)
            share *= update.weight / total
            mean += share
        mean *= server_learning_rate
        after, start = {}, 0
        for name, value in parameters.items():
            part = mean[start : start + value.size].reshape(value.shape)
            after[name] = (value + part).astype(value.dtype)
            start += value.size
        return state, after

    return FederatedAlgorithm(init=lambda parameters: {}, apply=apply)


def algorithm_of(settings: Algorithm) -> FederatedAlgorithm:
    """The algorithm that a study names."""
    return {"fedavg": fedavg}[settings.name](settings.server_learning_rate)
