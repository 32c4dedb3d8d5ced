"""Files that come from outside, and files that must never be half-written."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import FedwardError

MAX_CONFIG_BYTES = 1 << 20


class Strict(BaseModel):
    """Part of a file or message that comes from outside: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=BaseModel)


def read_bounded(path: Path, error: type[FedwardError], limit: int = MAX_CONFIG_BYTES) -> bytes:
    """A file's bytes.

    Raises:
        error: naming the file, if it can't be read or holds more than `limit` bytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as failure:
        raise error(
            f"{path}: cannot be read ({failure.strerror})", remedy="check the path and its permissions"
        ) from None
    if len(content) > limit:
        raise error(f"{path}: more than {limit} bytes", remedy="give the right file; this one is too large")
    return content


def parse_config(content: bytes, origin: str, error: type[FedwardError]) -> Any:
    """TOML or JSON text (JSON starts with a brace) as plain values.

    Raises:
        error: naming the origin and the line.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as failure:
        raise error(f"{origin}: not UTF-8 at byte {failure.start}", remedy="save it as UTF-8") from None
    try:
        return json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as failure:
        raise error(f"{origin}: {failure}", remedy="mend the syntax there") from None


def validated(model: type[M], value: object, origin: str, error: type[FedwardError]) -> M:
    """`value` as a `model`.

    Raises:
        error: one line per field that is wrong: where it is and why, never its content.
    """
    try:
        return model.model_validate(value)
    except ValidationError as failure:
        found = failure.errors(include_input=False, include_url=False, include_context=False)
        lines = [f"{'.'.join(str(p) for p in e['loc']) or '(whole)'}: {e['msg']}" for e in found]
        shown = "; ".join(lines[:10]) + (f"; and {len(lines) - 10} more" if len(lines) > 10 else "")
        raise error(f"{origin}: {shown}", remedy="mend the named fields") from None


def load_config(model: type[M], path: Path, error: type[FedwardError]) -> M:
    """Read a TOML or JSON file into a `model`.

    Raises:
        error: naming file, field or line, and the remedy.
    """
    return validated(model, parse_config(read_bounded(path, error), str(path), error), str(path), error)


_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)  # made once: json.dumps would make one for each call


def canonical_json(value: object) -> bytes:
    """The one form of a value that is hashed and signed: keys sorted, no white space, UTF-8.

    Raises:
        ValueError: if it holds NaN or infinity.
    """
    return _CANONICAL.encode(value).encode()


def write_atomic(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file as a whole: its old or its new content survives a crash, nothing between.

    Raises:
        OSError: if the folder can't be written; the old file is then untouched.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (a rename, a new file) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
