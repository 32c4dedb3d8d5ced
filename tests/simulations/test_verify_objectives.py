"""Certificates of studies with several labels, quantiles, times and frozen layers: what an honest site signs
holds, and less noise in its histograms than one patient's share in them asks for does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from certified import claims, token
from small import study

from common.privacy.certificate import read_certificate
from common.privacy.plan import histogram_sensitivity
from simulations.audit.verify import Evidence, Verdict, verify

SEX = {"kind": "categorical", "name": "sex", "codes": {"0": "f", "1": "m"}}
NUMBERS = {"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 4}
NUMBER = {"column": "y", "range": [1, 9], "unit": "mg", "transform": "sqrt"}
TIME = {"column": "T", "event": "E", "range": [0, 9], "unit": "a", "cuts": [2, 5]}
# What there is of each, and the squares of the largest contribution, worked out by hand.
STUDIES: dict[str, tuple[dict[str, Any], int]] = {
    "several labels": ({
        "data": {"label": {"columns": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}},
        "objective": {"task": "multi-label"},
    }, 3),
    "quantiles": ({
        "data": {"label": NUMBER},
        "objective": {"task": "regression", "loss": "quantile", "quantiles": [0.1, 0.5, 0.9]},
    }, 5),
    "one quantile": ({
        "data": {"label": NUMBER},
        "objective": {"task": "regression", "loss": "quantile", "quantiles": [0.7]},
    }, 3),
    "near": ({
        "data": {"label": NUMBER}, "objective": {"task": "regression"}, "evaluation": {"tolerance": 0.2},
    }, 4),
    "survival": ({
        "data": {"label": TIME}, "objective": {"task": "survival"}, "evaluation": {"horizons": [2.0, 5.0]},
    }, 3),
    "bands": ({
        "data": {"columns": [{**NUMBERS, "repeat": 1}, SEX], "label": TIME},
        "objective": {"task": "survival"},
        "evaluation": {"subgroups": ["sex"], "bands": {"x": [0.0]}},
    }, 6),
    "frozen": ({"model": {"name": "mlp", "parameters": {"hidden": [3]}, "frozen": ["0"]}}, 1),
}  # fmt: skip


def verdict(value: dict[str, Any], *known: Any) -> Verdict:
    certificate = read_certificate(token(value).encode())
    return verify({"one": certificate}, Evidence(studies=known))[0]


@pytest.mark.parametrize("name", STUDIES)
def test_honest_ones_hold_and_forged_ones_do_not(name: str) -> None:
    changes, squares = STUDIES[name]
    model = {"name": "mlp", "parameters": {"hidden": [3]}}
    wanted = study(**{"model": model, **changes})
    assert histogram_sensitivity(wanted) == pytest.approx(squares**0.5)
    honest = claims(wanted)
    assert verdict(honest, wanted).holds, verdict(honest, wanted).reasons
    forged = copy.deepcopy(honest)
    forged["plan"]["evaluation"]["sensitivity"] *= 0.99
    (reason,) = verdict(forged, wanted).reasons
    assert "sensitivity of the evaluation" in reason.text
    less = copy.deepcopy(honest)
    for release in less["releases"]:
        if release["evaluation"]:
            release["evaluation"]["noise_multiplier"] *= 0.8
    assert not verdict(less, wanted).holds


def test_another_study_of_the_same_name_is_another_study() -> None:
    """One horizon more, one frozen layer more: what a site approved it has signed."""
    wanted, other = (
        study(**{**STUDIES["survival"][0], "model": {"name": "mlp"}, "evaluation": {"horizons": h}})
        for h in ([5.0], [2.0, 5.0])
    )
    assert verdict(claims(wanted), wanted).holds
    assert not verdict(claims(wanted), other).holds
    relabelled = {**claims(wanted), "study": other.digest}
    assert "sensitivity of the evaluation" in " ".join(r.text for r in verdict(relabelled, other).reasons)
