"""What crosses the wall: it comes back as it was, and anything else is a MessageError that quotes nothing."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from common.errors import MessageError
from common.messages import (
    HEADER,
    MAX_CERTIFICATE_CHARACTERS,
    NO_HEAD,
    STATISTICS_ROUND,
    Job,
    JobHeader,
    Refusal,
    RefusalHeader,
    Reply,
    ReplyHeader,
    all_finite,
    as_safetensors,
    asked,
    decode,
    encode,
    released,
    sealed,
)
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian

STUDY = "ab" * 32
SECRET = "hiddensecret"
PRIVACY = ("epsilon", "delta", "clipping_norm", "sample_rate", "steps", "limits", "plan", "policy", "seed")
arrays = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    max_size=4,
)


def job_header(**changes: Any) -> dict[str, Any]:
    return {"kind": "job", "session": "one", "round": 1, "study": STUDY, "metrics": "private"} | changes


def reply_header(**changes: Any) -> dict[str, Any]:
    return {"kind": "reply", "session": "one", "round": 1, "study": STUDY, "site": "x", "weight": 1} | changes


def a_reply() -> Reply:
    event = SubsampledGaussian(noise_multiplier=1.5, sample_rate=0.1, steps=3)
    header = ReplyHeader(session="one", round=2, study=STUDY, site="north", weight=40, training=event)
    return Reply(header, {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, {"scores": np.zeros((2, 4))})


def a_job() -> Job:
    return Job(JobHeader(**job_header()), {"w": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)})


def same(a: Any, b: Any) -> bool:
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def rejected(content: bytes) -> str:
    with pytest.raises(MessageError) as error:
        decode(content)
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None
    return error.value.message


@settings(deadline=None, derandomize=True)
@given(arrays)
def test_jobs_come_back(parameters: dict[str, np.ndarray]) -> None:
    job = Job(JobHeader(**job_header()), parameters)
    found = decode(encode(job))
    assert isinstance(found, Job)
    assert found.header == job.header
    assert same(found.parameters, parameters)


@settings(deadline=None, derandomize=True)
@given(arrays, arrays)
def test_replies_come_back(update: dict[str, np.ndarray], metrics: dict[str, np.ndarray]) -> None:
    reply = Reply(a_reply().header, update, metrics)
    found = decode(encode(reply))
    assert isinstance(found, Reply)
    assert found.header == reply.header
    assert same(found.update, update)
    assert same(found.metrics, metrics)


def test_refusals_come_back() -> None:
    refusal = Refusal(RefusalHeader(site="north", code="not-approved", message="no é", remedy="ask"))
    assert decode(encode(refusal)) == refusal


def test_equal_messages_are_equal_bytes() -> None:
    parameters = {f"p{i}": np.full(3, i, np.float32) for i in range(20)}
    backwards = dict(reversed(parameters.items()))
    one, two = (encode(Job(JobHeader(**job_header()), p)) for p in (parameters, backwards))
    assert one == two == encode(decode(one))
    view = {"w": np.arange(12, dtype=np.float32).reshape(3, 4).T}
    assert same(decode(encode(Job(JobHeader(**job_header()), view))).parameters, view)


def test_every_truncation_is_rejected() -> None:
    for message in (a_job(), a_reply()):
        content = encode(message)
        for length in range(len(content)):
            rejected(content[:length])
        rejected(content + b"\x00")


def test_no_flipped_bit_is_anything_but_a_message_or_an_error() -> None:
    content = encode(a_reply())
    for position in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            try:
                decode(bytes(changed))
            except MessageError:
                continue


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.binary(max_size=300))
def test_noise_is_rejected(content: bytes) -> None:
    rejected(content)
    rejected(struct.pack("<Q", len(content)) + content)


def blob(header: Any, arrays: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """A safetensors file by hand, so that it can lie."""
    text = header if isinstance(header, bytes) else json.dumps(
        {"__metadata__": {HEADER: header if isinstance(header, str) else json.dumps(header)}} | (arrays or {})
    ).encode()  # fmt: skip
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_hand_made_file_is_sound_when_it_does_not_lie() -> None:
    good = blob(job_header(), {"parameters/w": entry("F32", [2], [0, 8])}, bytes(8))
    assert decode(good).parameters["w"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "lie",
    [
        {"parameters/w": entry("F32", [2_500_000_000], [0, 10_000_000_000])},
        {"parameters/w": entry("F32", [2**40, 2**40], [0, 8])},
        {"parameters/w": entry("F32", [2**63], [0, 8])},
        {"parameters/w": entry("F32", [-2], [0, 8])},
        {"parameters/w": entry("F32", [2], [8, 0])},
        {"parameters/w": entry("F32", [2], [-8, 0])},
        {"parameters/w": entry("F32", [2], [4, 12])},
        {"parameters/w": entry("F32", [3], [0, 8])},
        {"parameters/w": entry("F32", [2], [0, 8]), "parameters/v": entry("F32", [2], [0, 8])},
        {"parameters/w": entry("F99", [2], [0, 8])},
        {"parameters/w": {"dtype": "F32"}},
        {"parameters/w": 7},
        {"parameters/w": entry("F16", [4], [0, 8])},
        {"parameters/w": entry("BF16", [4], [0, 8])},
        {"parameters/w": entry("I32", [2], [0, 8])},
        {"parameters/w": entry("U8", [8], [0, 8])},
        {"parameters/w": entry("BOOL", [8], [0, 8])},
        {"parameters/w": entry("F8_E4M3", [8], [0, 8])},
        {"parameters/w": entry("C64", [1], [0, 8])},
        {"w": entry("F32", [2], [0, 8])},
        {f"{SECRET}/w": entry("F32", [2], [0, 8])},
        {"update/w": entry("F32", [2], [0, 8])},
        {"parameters": entry("F32", [2], [0, 8])} | {SECRET: entry("F32", [0], [8, 8])},
    ],
    ids=str,
)
def test_a_lying_table_of_arrays(lie: dict[str, Any]) -> None:
    tracemalloc.start()
    rejected(blob(job_header(), lie, bytes(8)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


@pytest.mark.parametrize("length", [10 * 2**30, 2**63, 2**64 - 1, 1 << 21])
def test_a_header_that_claims_gigabytes(length: int) -> None:
    rejected(struct.pack("<Q", length) + encode(a_job())[8:])
    rejected(struct.pack("<Q", length))


@pytest.mark.parametrize(
    "header",
    [
        job_header(kind=SECRET),
        job_header(kind=None),
        job_header(round=-1),
        job_header(round=10**7),
        job_header(round="1; DROP"),
        job_header(round=1.5),
        job_header(round=10**400),
        job_header(session="../" + SECRET),
        job_header(session=""),
        job_header(session="a" * 65),
        job_header(session="one\n"),
        job_header(study=STUDY.upper()),
        job_header(study=SECRET),
        job_header(metrics=SECRET),
        job_header(**{SECRET: SECRET}),
        job_header(noise_multiplier=0.0),
        *(job_header(**{name: 1.0}) for name in PRIVACY),
        job_header(anchors={SECRET + "!": "0" * 64}),
        job_header(anchors={"north": SECRET}),
        job_header(anchors={"north": "A" * 64}),
        job_header(anchors={"north": None}),
        job_header(anchors=[["north", "0" * 64]]),
        job_header(anchors=SECRET),
        {k: v for k, v in job_header().items() if k != "study"},
        {k: v for k, v in job_header().items() if k != "kind"},
        [SECRET],
        None,
        7,
        {"kind": "reply", "site": SECRET},
        {"kind": "reply", "session": "one", "round": 1, "study": STUDY, "site": "x", "weight": 1,
         "training": {SECRET: 1}},
        {"kind": "reply", "session": "one", "round": 1, "study": STUDY, "site": "x", "weight": 1,
         "training": {"noise_multiplier": -1, "sample_rate": 2, "steps": 0}},
        {"kind": "refusal", "site": "x", "code": "c", "message": SECRET * 1000},
        reply_header(head=SECRET),
        reply_header(head="A" * 64),
        reply_header(head=""),
        reply_header(certificate=7),
        reply_header(certificate="x" * (MAX_CERTIFICATE_CHARACTERS + 1)),
        reply_header(statistics={SECRET: 1}),
        reply_header(statistics={"mechanism": "gaussian", "noise_multiplier": 0.0}),
        reply_header(statistics={"mechanism": "gaussian", "noise_multiplier": 1.0, "unit": "record"}),
        reply_header(weight=0),
        reply_header(patients=53),
    ],
    ids=lambda h: str(h)[:60],
)  # fmt: skip
def test_a_wrong_header(header: Any) -> None:
    rejected(blob(header))


@pytest.mark.parametrize(
    "content",
    [
        blob(b'{"__metadata__":{"fedward":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
        blob(b"[" * 500_000),
        blob(b'{"a":' * 100_000),
        blob("[" * 100_000),
        blob('{"kind":' * 50_000),
        blob('{"kind": "job", "round": ' + "9" * 5000 + "}"),
        blob(b"{}"),
        blob(b"[]"),
        blob(b'"text"'),
        blob(b'{"__metadata__": 3}'),
        blob(b'{"__metadata__": {"fedward": 3}}'),
        blob(b'{"__metadata__": {"fedward": null}}'),
        blob(b'{"__metadata__": {"fedward": {"kind": "job"}}}'),
        blob(b'{"__metadata__": {"other": "x"}}'),
        blob(b"\xff\xfe{}"),
        blob(b'{"__metadata__": {"fedward": "\\ud800"}}'),
        blob(b"NaN"),
        blob("{}"),
        blob(""),
    ],
    ids=range(19),
)
def test_bombs_and_oddities(content: bytes) -> None:
    rejected(content)


def test_a_refusal_carries_nothing_else() -> None:
    header = {"kind": "refusal", "site": "x", "code": "c", "message": "m"}
    assert isinstance(decode(blob(header)), Refusal)
    rejected(blob(header, {"update/w": entry("F32", [2], [0, 8])}, bytes(8)))
    rejected(blob(header, {SECRET: entry("F32", [0], [0, 0])}))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    )
)
def test_any_json_as_header(value: Any) -> None:
    rejected(blob(value if not isinstance(value, str) else json.dumps(value)))


def test_safetensors_of_others_are_rejected() -> None:
    assert "KeyError" in rejected(save({SECRET: np.zeros(2)}))
    rejected(save({SECRET: np.zeros(2)}, metadata={"format": "pt"}))


# --- statistics, heads, scaling


@settings(deadline=None, derandomize=True)
@given(arrays, arrays)
def test_scaling_comes_back_beside_parameters(
    parameters: dict[str, np.ndarray], scaling: dict[str, np.ndarray]
) -> None:
    found = decode(encode(Job(JobHeader(**job_header()), parameters, scaling)))
    assert isinstance(found, Job)
    assert same(found.parameters, parameters)
    assert same(found.scaling, scaling)


def test_anchors_heads_and_certificates_come_back() -> None:
    heads = {"north": "1" * 64, "south-2": "f" * 64}
    header = JobHeader(**job_header(round=STATISTICS_ROUND, anchors=heads))
    assert decode(encode(Job(header, {}))).header == header
    assert JobHeader(**job_header()).anchors == {}
    assert ReplyHeader(**reply_header()).head == NO_HEAD == "0" * 64
    told = ReplyHeader(
        **reply_header(
            round=0, head="a" * 64, certificate="x" * 1000, statistics=GaussianRelease(noise_multiplier=2.0)
        )
    )
    assert decode(encode(Reply(told, {}, {}))).header == told
    longest = reply_header(certificate="x" * MAX_CERTIFICATE_CHARACTERS)
    assert decode(encode(Reply(ReplyHeader(**longest), {}, {}))).header.certificate is not None


def test_a_job_carries_no_privacy_parameter() -> None:
    """Every field of it by name: a new one must be thought about here."""
    assert set(JobHeader.model_fields) == {"kind", "session", "round", "study", "metrics", "anchors"}


# --- what was asked, what was released


def test_what_is_asked_does_not_hang_on_anchors() -> None:
    parameters = {"w": np.ones((2, 3), np.float32)}
    plain = Job(JobHeader(**job_header()), parameters)
    anchored = Job(JobHeader(**job_header(anchors={"north": "1" * 64})), parameters)
    assert encode(plain) != encode(anchored)
    assert asked(plain) == asked(anchored) == asked(decode(encode(anchored)))  # type: ignore[arg-type]
    assert len(asked(plain)) == 64


@pytest.mark.parametrize(
    "changes",
    [{"session": "two"}, {"round": 2}, {"study": "0" * 64}, {"metrics": "exact"}],
    ids=str,
)
def test_what_is_asked_hangs_on_the_rest_of_the_header(changes: dict[str, Any]) -> None:
    parameters = {"w": np.ones((2, 3), np.float32)}
    one, two = (Job(JobHeader(**job_header(**c)), parameters) for c in ({}, changes))
    assert asked(one) != asked(two)
    assert set(JobHeader.model_fields) == {"kind", "anchors", "session", "round", "study", "metrics"}


def one_bit_off(value: np.ndarray) -> np.ndarray:
    found = bytearray(value.tobytes())
    found[0] ^= 1
    return np.frombuffer(bytes(found), value.dtype).reshape(value.shape)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(first=arrays, second=arrays)
def test_equal_numbers_have_equal_digests_and_others_have_not(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray]
) -> None:
    """Names, types, shapes and bytes count, and to which group an array belongs."""
    header = JobHeader(**job_header())
    digests = {
        "released": released(first, second),
        "asked": asked(Job(header, first, second)),
    }
    backwards = dict(reversed(first.items())), dict(reversed(second.items()))
    assert digests["released"] == released(*backwards)
    assert digests["asked"] == asked(Job(header, *backwards))
    fortran = {n: np.array(a, order="F") for n, a in first.items()}
    assert digests["released"] == released(fortran, second)
    if not same(first, second):
        assert digests["released"] != released(second, first)
        assert digests["asked"] != asked(Job(header, second, first))
    for name, array in first.items():
        others = [{**first, name + "x": array}, {n: a for n, a in first.items() if n != name}]
        others.append({**first, name: array[None]})
        if array.size:
            others.append({**first, name: one_bit_off(array)})
            kind = {np.dtype(np.float64): np.int64}.get(array.dtype, np.float64)
            others.append({**first, name: np.zeros(array.shape, kind)})
        for other in others:
            if not same(other, first):
                assert released(other, second) != digests["released"]
                assert asked(Job(header, other, second)) != digests["asked"]


def test_a_released_digest_by_hand() -> None:
    """So that whoever audits can write it in another language."""
    update = {"b": np.array([1.5, -2.0], np.float32), "a": np.float64(7.0).reshape(())}
    expected = hashlib.sha256(b"released")
    for name, kind, shape, content in (
        ("metrics/n", "int64", [1], struct.pack("<q", -3)),
        ("update/a", "float64", [], struct.pack("<d", 7.0)),
        ("update/b", "float32", [2], struct.pack("<ff", 1.5, -2.0)),
    ):
        head = json.dumps([name, kind, shape], separators=(",", ":")).encode()
        expected.update(len(head).to_bytes(8, "little") + head + content)
    assert released(update, {"n": np.array([-3])}) == expected.hexdigest()


FORMS = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.builds(
        lambda kind, shape: np.arange(int(np.prod(shape))).reshape(shape).astype(kind),
        st.sampled_from(["float32", "float64", "int64"]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=5,
)


@given(arrays=FORMS, header=st.text(max_size=30))
def test_messages_are_written_as_safetensors_writes_them(arrays: dict[str, np.ndarray], header: str) -> None:
    assert as_safetensors(arrays, header) == save(arrays, metadata={HEADER: header})
    assert as_safetensors(arrays) == save(arrays)


def test_a_sealed_message_is_its_bytes_and_is_not_read_again() -> None:
    header = JobHeader(session="one", round=1, study="0" * 64)
    job = Job(header, {"w": np.ones((2, 3), dtype=np.float32)})
    content = sealed(job)
    assert content == encode(job)
    assert decode(content) is job
    arrived = pickle.loads(pickle.dumps(content))
    assert type(arrived) is bytes
    assert decode(arrived) is not job
    assert asked(decode(arrived)) == asked(job) == job.asked
    assert type(decode(bytes(content)).header) is JobHeader


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_one_value_that_is_not_finite_is_found(wrong: float, kind: type) -> None:
    for place in range(6):
        array = np.zeros((2, 3), dtype=kind)
        assert all_finite({"cells": np.arange(3), "empty": np.zeros(0), "a": array})
        array.flat[place] = wrong
        assert not all_finite({"cells": np.arange(3), "empty": np.zeros(0), "a": array})


def test_the_digest_of_a_reply_does_not_depend_on_how_its_arrays_lie() -> None:
    """In columns, or with the bytes of a number the other way round: what travels is the same."""
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    odd = np.asfortranarray(plain), plain.astype(">f4"), np.repeat(plain, 2, axis=1)[:, ::2]
    assert {released({"a": each}, {}) for each in odd} == {released({"a": plain}, {})}
