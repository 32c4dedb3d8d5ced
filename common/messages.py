"""Every message that crosses the wall: one safetensors blob, its header in the metadata as JSON.

No pickle anywhere: safetensors checks its own bounds, pydantic checks the header, and what remains is
numbers of known shape. A `Job` goes to a site; a `Reply` or a `Refusal` comes back.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import MessageError
from common.fields import Digest, Slug
from common.files import Strict, canonical_json
from common.privacy.mechanism import Event

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
HEADER = "fedward"
MAX_HEADER_BYTES = 8 << 20
MAX_CERTIFICATE_CHARACTERS = 4 << 20
DTYPES = frozenset({"float32", "float64", "int64"})
_TEXT = json.JSONEncoder(ensure_ascii=False)
_RELEASED = b"released"
_LITTLE = sys.byteorder == "little"
_NAMES = {np.dtype(np.int64): "I64", np.dtype(np.float64): "F64", np.dtype(np.float32): "F32"}
_RANKS = {kind: rank for rank, kind in enumerate(_NAMES)}  # the library lays out the widest first

SessionId = Annotated[str, Field(pattern=r"^[0-9a-z][0-9a-z-]{0,63}$")]
RoundNumber = Annotated[int, Field(ge=0, le=1_000_000)]
STATISTICS_ROUND = 0
NO_HEAD = "0" * 64  # of a ledger without entries


class JobHeader(Strict):
    """What the coordinator asks for; it carries no privacy parameter, and nothing to run.

    Attributes:
        round: 0 asks for the cohort's statistics; 1 … rounds trains; rounds + 1 evaluates the final model
            only.
        metrics: `private` as the study says; `exact` for cohorts that are public anyway.
        anchors: site → the last head of its ledger that the coordinator has seen. A site whose ledger
            lacks it was put back to an older copy.
    """

    kind: Literal["job"] = "job"
    session: SessionId
    round: RoundNumber
    study: Digest
    metrics: Literal["private", "exact"] = "private"
    anchors: dict[Slug, Digest] = Field(default_factory=dict)


class ReplyHeader(Strict):
    """What a site tells besides its arrays; everything here is public or paid for.

    Attributes:
        weight: training patients that the declared public size stands for.
        training, evaluation: what this round cost training and test patients.
        statistics: what it cost all patients.
        exact: the metrics carry no noise, because the site's policy calls the cohort public.
        head, sequence: of the site's ledger, with this round's reservation as its last entry.
        certificate: with the final evaluation: what the site promises for the session (JWS).
    """

    kind: Literal["reply"] = "reply"
    session: SessionId
    round: RoundNumber
    study: Digest
    site: Slug
    weight: Annotated[int, Field(ge=1)]
    training: Event | None = None
    evaluation: Event | None = None
    statistics: Event | None = None
    exact: bool = False
    head: Digest = NO_HEAD
    sequence: Annotated[int, Field(ge=0, le=2**53)] = 0
    certificate: Annotated[str, Field(max_length=MAX_CERTIFICATE_CHARACTERS)] | None = None


class RefusalHeader(Strict):
    """A site's no: a name for machines, and text that holds nothing about patients."""

    kind: Literal["refusal"] = "refusal"
    site: Slug
    code: str
    message: Annotated[str, Field(max_length=2000)]
    remedy: Annotated[str, Field(max_length=2000)] = ""


@dataclass(frozen=True)
class Job:
    """Nobody changes the arrays: in a simulation all sites are handed the same ones.

    Attributes:
        parameters: the global model, name → array; empty if statistics are asked for.
        scaling: `mean` and `deviation` of the numeric sources, where the study scales by moments.
        fitting: digests of the studies whose model and scaling these arrays were found to fit.
    """

    header: JobHeader
    parameters: Arrays
    scaling: Arrays = field(default_factory=dict)
    fitting: set[str] = field(default_factory=set, compare=False, repr=False)

    @cached_property
    def asked(self) -> str:
        """See `asked`."""
        header = self.header.model_dump(mode="json", exclude={"anchors"})
        arrays = _prefixed("parameters", self.parameters) | _prefixed("scaling", self.scaling)
        return _digest(canonical_json(header), arrays)


@dataclass(frozen=True)
class Reply:
    """Attributes:
    update: local minus global parameters, name → array; empty if only evaluated.
    metrics: histograms (or statistics), name → array; empty if not evaluated.
    """

    header: ReplyHeader
    update: Arrays
    metrics: Arrays

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """Both groups under the names by which they travel."""
        return _prefixed("update", self.update) | _prefixed("metrics", self.metrics)

    @cached_property
    def released(self) -> str:
        """See `released`."""
        return _digest(_RELEASED, self.arrays)


@dataclass(frozen=True)
class Refusal:
    header: RefusalHeader


class Sealed(bytes):
    """A message's bytes, beside the message that they were made from.

    Where both ends are in one process the message is handed over as it is; on any longer way the bytes are
    what travels, and what arrives is plain bytes.
    """

    message: Job | Reply | Refusal

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        return bytes, (bytes(self),)


def sealed(message: Job | Reply | Refusal) -> Sealed:
    """A message as bytes that know it; see `encode`."""
    content = Sealed(encode(message))
    content.message = message
    return content


_HEADER: TypeAdapter[JobHeader | ReplyHeader | RefusalHeader] = TypeAdapter(
    Annotated[JobHeader | ReplyHeader | RefusalHeader, Field(discriminator="kind")]
)


def encode(message: Job | Reply | Refusal) -> bytes:
    """A message as bytes; `decode` gives it back."""
    arrays: dict[str, Array] = {}
    if isinstance(message, Job):
        arrays = _prefixed("parameters", message.parameters) | _prefixed("scaling", message.scaling)
    elif isinstance(message, Reply):
        arrays = message.arrays
    return _written(arrays, message.header.model_dump_json())


def decode(content: bytes) -> Job | Reply | Refusal:
    """Read a message.

    Raises:
        MessageError: if it isn't a well-formed one; the text quotes nothing of its content.
    """
    if isinstance(content, Sealed):
        return content.message
    header, arrays = _parts(content)
    if isinstance(header, JobHeader):
        groups = {"parameters", "scaling"}
        return Job(header, _group("parameters", arrays, groups), _group("scaling", arrays, groups))
    if isinstance(header, ReplyHeader):
        groups = {"update", "metrics"}
        return Reply(header, _group("update", arrays, groups), _group("metrics", arrays, groups))
    if arrays:
        raise MessageError("a refusal carries no arrays", remedy="update the site's software")
    return Refusal(header)


def asked(job: Job) -> str:
    """SHA-256 of what a job asks for: all of it but its anchors, which say nothing about the work."""
    return job.asked


def released(update: Arrays, metrics: Arrays) -> str:
    """SHA-256 of the numbers that left with a reply, 64 hexadecimal digits."""
    return _digest(_RELEASED, _prefixed("update", update) | _prefixed("metrics", metrics))


def all_finite(arrays: Arrays) -> bool:
    """Whether no value is NaN or infinite.

    Args:
        arrays: of floating-point numbers or integers.
    """
    for array in arrays.values():  # a plain loop: most arrays are small, and a generator would cost as much
        if array.dtype.kind != "i" and np.count_nonzero(np.isfinite(array)) != array.size:
            return False
    return True


def _digest(what: bytes, arrays: Arrays) -> str:
    """Each array counts with its name, type, shape and bytes (little-endian, C order)."""
    digest = hashlib.sha256(what)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(_array_head(name, array.dtype, array.shape))
        digest.update(array.data)
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _array_head(name: str, kind: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    head = canonical_json([name, str(kind), list(shape)])
    return len(head).to_bytes(8, "little") + head


def _little_endian(array: Array) -> Array:
    """In C order."""
    array = np.asarray(array, order="C")
    if _LITTLE and array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _parts(content: bytes) -> tuple[JobHeader | ReplyHeader | RefusalHeader, dict[str, Array]]:
    remedy = "both sides must run the same version of fedward"
    try:
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 or length > min(MAX_HEADER_BYTES, len(content) - 8):
            raise MessageError("a message whose header is larger than itself", remedy=remedy)
        text = json.loads(content[8 : 8 + length])["__metadata__"][HEADER]
        header = _HEADER.validate_json(text)
        arrays = load(content)
    except ValidationError as error:
        where = "; ".join(_named(e["type"], e["loc"]) for e in error.errors(include_input=False)[:5])
        raise MessageError(f"a message with a wrong header ({where})", remedy=remedy) from None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MessageError(f"not a message ({type(error).__name__})", remedy=remedy) from None
    odd = sorted({str(a.dtype) for a in arrays.values()} - DTYPES)
    if odd:
        raise MessageError(f"a message with arrays of type {', '.join(odd)}", remedy=remedy)
    return header, arrays


def as_safetensors(arrays: Arrays, header: str | None = None) -> bytes:
    """What that library's `save` writes, which takes its time for arrays as small as most are.

    Args:
        header: goes into the metadata; None leaves them out.
    """
    return _written({name: _little_endian(array) for name, array in arrays.items()}, header)


def _written(little: dict[str, Array], header: str | None) -> bytes:
    try:
        order = _layout(tuple([(name, array.dtype) for name, array in little.items()]))
    except KeyError:  # of another type than we send
        return save(little, metadata=None if header is None else {HEADER: header})
    parts, start = [], 0
    for name, opening in order:
        array = little[name]
        shape, end = array.shape, start + array.nbytes
        lengths = shape[0] if len(shape) == 1 else ",".join(map(str, shape))
        parts.append(f'{opening}{lengths}],"data_offsets":[{start},{end}]}}')
        start = end
    index = "".join(parts).encode()
    if header is None:
        text = b"{%b}" % index[1:]
    else:
        text = b'{"__metadata__":{"%b":%b}%b}' % (HEADER.encode(), _TEXT.encode(header).encode(), index)
    text += b" " * (-len(text) % 8)
    contents = [little[name].data for name, _ in order]
    return b"".join([len(text).to_bytes(8, "little"), text, *contents])


@lru_cache(maxsize=256)
def _layout(forms: tuple[tuple[str, np.dtype[Any]], ...]) -> list[tuple[str, str]]:
    """Arrays in the order in which they lie in a message, each with its part of the index up to the shape."""
    ordered = sorted(forms, key=lambda form: (_RANKS[form[1]], form[0].encode()))
    return [(name, f',{_TEXT.encode(name)}:{{"dtype":"{_NAMES[kind]}","shape":[') for name, kind in ordered]


def _named(kind: str, place: tuple[int | str, ...]) -> str:
    """An error in a header by its place; names of unknown fields and sites are the sender's, so they go."""
    known = place[:-1] if kind == "extra_forbidden" else place
    if "anchors" in known:
        known = known[: known.index("anchors") + 1]
    return f"{'.'.join(str(p) for p in known)}: {kind}"


def _prefixed(group: str, arrays: Arrays) -> dict[str, Array]:
    opening = f"{group}/"
    return {opening + name: _little_endian(array) for name, array in arrays.items()}


def _group(group: str, arrays: Arrays, allowed: set[str]) -> dict[str, Array]:
    unknown = [name for name in arrays if name.partition("/")[0] not in allowed]
    if unknown:
        raise MessageError(
            f"a message with {len(unknown)} arrays of no known group",
            remedy="both sides must run the same version of fedward",
        )
    return {n.partition("/")[2]: a for n, a in arrays.items() if n.partition("/")[0] == group}
