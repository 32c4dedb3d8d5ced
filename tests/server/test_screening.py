"""What a site may send: any change to an honest reply that matters is found, and nothing is quoted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import classes, study

from common.cells import packed
from common.errors import MessageError
from common.histograms import EXACT_BINS, histogram_shapes
from common.messages import Job, JobHeader, Refusal, RefusalHeader, Reply, ReplyHeader, encode
from common.models import parameter_arrays, study_model
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian
from common.statistics import layout
from common.study import Study
from server.screening import LARGEST_WEIGHT, screened

BINARY = study(evaluation={"every": 1})
SURVEY = study(statistics={"epsilon": 1.0, "delta": 1e-4, "bins": 4})
MULTI = study(data={"label": classes(3)}, objective={"task": "multi-class"}, evaluation={"every": 1})

COST = SubsampledGaussian(noise_multiplier=2.0, sample_rate=0.5, steps=3)


def asked(wanted: Study, number: int = 2, exact: bool = False) -> Job:
    metrics: Any = "exact" if exact else "private"
    header = JobHeader(session="one", round=number, study=wanted.digest, metrics=metrics)
    return Job(header, parameter_arrays(study_model(wanted)))


def honest(wanted: Study, number: int = 2, **changes: Any) -> Reply:
    job, evaluates, exact = asked(wanted, number), wanted.evaluates_in(number), bool(changes.get("exact"))
    shapes = histogram_shapes(wanted, EXACT_BINS if exact else wanted.evaluation.bins) if evaluates else {}
    header = {
        "session": "one", "round": number, "study": wanted.digest, "site": "north", "weight": 40,
        "training": COST if wanted.private and number <= wanted.algorithm.rounds else None,
        "evaluation": COST if wanted.private and evaluates and not exact else None, **changes,
    }  # fmt: skip
    update = job.parameters if number <= wanted.algorithm.rounds else {}
    sums = {n: np.ones(s) for n, s in shapes.items()}
    return Reply(ReplyHeader(**header), update, packed(sums) if exact else sums)


@pytest.mark.parametrize("wanted", [BINARY, MULTI], ids=["binary", "multi"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("exact", [False, True])
def test_an_honest_reply_passes(wanted: Study, number: int, exact: bool) -> None:
    reply = honest(wanted, number, exact=exact and wanted.evaluates_in(number))
    found = screened(encode(reply), asked(wanted, number, exact), wanted)
    assert isinstance(found, Reply)
    assert found.header == reply.header


@pytest.mark.parametrize(
    "changes",
    [{"training": None}, {"evaluation": None}, {"exact": True}, {"exact": True, "evaluation": None}],
    ids=["free training", "free metrics", "exact at a price", "exact unasked"],
)
def test_a_reply_that_hides_its_cost(changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match=r"cost|noise"):
        screened(encode(honest(BINARY, 2, **changes)), asked(BINARY), BINARY)


def test_what_is_frozen_may_not_come_changed() -> None:
    wanted = study(model={"name": "mlp", "parameters": {"hidden": [3]}, "frozen": ["0"]})
    reply = honest(wanted)
    with pytest.raises(MessageError, match="an update of what the study freezes"):
        screened(encode(reply), asked(wanted), wanted)
    update = {n: 0 * a if n.startswith("0.") else a for n, a in reply.update.items()}
    assert screened(encode(Reply(reply.header, update, reply.metrics)), asked(wanted), wanted)


def test_a_refusal_passes() -> None:
    refusal = Refusal(RefusalHeader(site="north", code="c", message="m"))
    assert screened(encode(refusal), asked(BINARY), BINARY) == refusal


def test_a_job_does_not() -> None:
    with pytest.raises(MessageError, match="a job"):
        screened(encode(asked(BINARY)), asked(BINARY), BINARY)


@pytest.mark.parametrize(
    "changes", [{"session": "two"}, {"round": 1}, {"study": "0" * 64}, {"weight": LARGEST_WEIGHT + 1}]
)
def test_a_header_of_something_else(changes: dict[str, Any]) -> None:
    reply = honest(BINARY)
    header = reply.header.model_copy(update=changes)
    with pytest.raises(MessageError):
        screened(encode(Reply(header, reply.update, reply.metrics)), asked(BINARY), BINARY)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    group=st.sampled_from(["update", "metrics"]),
    kind=st.sampled_from(["drop", "add", "rename", "type", "longer", "flat", "nan", "inf", "-inf"]),
    seed=st.integers(0, 1000),
    wanted=st.sampled_from([BINARY, MULTI]),
)
def test_no_changed_array_passes(group: str, kind: str, seed: int, wanted: Study) -> None:
    reply, random = honest(wanted), np.random.default_rng(seed)
    groups = {"update": dict(reply.update), "metrics": dict(reply.metrics)}
    arrays = groups[group]
    name = sorted(arrays)[random.integers(len(arrays))]
    array = np.array(arrays[name], copy=True)
    if kind == "drop":
        del arrays[name]
    elif kind == "add":
        arrays["hiddensecret"] = array
    elif kind == "rename":
        arrays["hiddensecret"] = arrays.pop(name)
    elif kind == "type":
        arrays[name] = array.astype(np.int64)
    elif kind == "longer":
        arrays[name] = np.concatenate([array, array])
    elif kind == "flat":
        arrays[name] = array[None]
    else:
        array.flat[random.integers(array.size)] = float(kind)
        arrays[name] = array
    with pytest.raises(MessageError) as error:
        screened(encode(Reply(reply.header, **groups)), asked(wanted), wanted)
    assert "hiddensecret" not in str(error.value)


def test_metrics_that_nobody_asked_for() -> None:
    quiet = study()
    reply = honest(quiet, 1)
    told = Reply(reply.header, reply.update, {"scores": np.ones((2, quiet.evaluation.bins))})
    with pytest.raises(MessageError, match="metrics"):
        screened(encode(told), asked(quiet, 1), quiet)


def test_an_update_after_the_last_round() -> None:
    reply = honest(BINARY, 4)
    told = Reply(reply.header, asked(BINARY).parameters, reply.metrics)
    with pytest.raises(MessageError, match="update"):
        screened(encode(told), asked(BINARY, 4), BINARY)


# --- a site that keeps its evaluation


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("exact", [False, True])
def test_a_reply_without_metrics_passes_for_nothing(number: int, exact: bool) -> None:
    """Its policy keeps them: the update counts all the same, and no evaluation may be charged for."""
    job, reply = asked(BINARY, number, exact), honest(BINARY, number)
    header = reply.header.model_copy(update={"evaluation": None, "exact": False})
    assert isinstance(screened(encode(Reply(header, reply.update, {})), job, BINARY), Reply)
    for changes in ({"evaluation": COST}, {"exact": True}, {"exact": True, "evaluation": COST}):
        odd = header.model_copy(update=changes)
        with pytest.raises(MessageError, match=r"cost|noise"):
            screened(encode(Reply(odd, reply.update, {})), job, BINARY)


# --- statistics

RELEASE = GaussianRelease(noise_multiplier=3.0)


def survey(**changes: Any) -> Reply:
    header = {"session": "one", "round": 0, "study": SURVEY.digest, "site": "north", "weight": 40}
    arrays = {"metrics": {n: np.ones(s) for n, s in layout(SURVEY).items()}, "update": {}}
    arrays |= {n: changes.pop(n) for n in list(changes) if n in arrays}
    return Reply(ReplyHeader(**header | {"statistics": RELEASE} | changes), **arrays)


def asked_for_statistics() -> Job:
    return Job(JobHeader(session="one", round=0, study=SURVEY.digest), {})


def test_honest_statistics_pass() -> None:
    found = screened(encode(survey()), asked_for_statistics(), SURVEY)
    assert isinstance(found, Reply)
    assert found.header == survey().header


@pytest.mark.parametrize(
    "changes",
    [
        {"statistics": None},
        {"training": COST},
        {"evaluation": COST},
        {"exact": True},
        {"round": 1},
        {"metrics": {}},
        {"metrics": {"scores": np.ones((2, 10))}},
        {"metrics": {n: np.full(s, np.nan) for n, s in layout(SURVEY).items()}},
        {"metrics": {n: np.ones(s, np.float32) for n, s in layout(SURVEY).items()}},
        {"metrics": {n: np.ones((*s, 1)) for n, s in layout(SURVEY).items()}},
        {"update": asked(SURVEY).parameters},
    ],
    ids=lambda c: str(c)[:40],
)
def test_statistics_of_another_kind_do_not(changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        screened(encode(survey(**changes)), asked_for_statistics(), SURVEY)


def test_statistics_in_a_round_of_training_do_not_pass() -> None:
    reply = honest(SURVEY, 1)
    header = reply.header.model_copy(update={"statistics": RELEASE})
    with pytest.raises(MessageError, match="cost"):
        screened(encode(Reply(header, reply.update, reply.metrics)), asked(SURVEY, 1), SURVEY)
    told = Reply(reply.header, reply.update, survey().metrics)
    with pytest.raises(MessageError):
        screened(encode(told), asked(SURVEY, 1), SURVEY)
