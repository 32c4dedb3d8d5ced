"""The weights that a study's model begins with: drawn from a seed, or from a file that the study names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from common.errors import StudyError
from common.files import read_bounded
from common.messages import Array, Arrays
from common.models.registry import parameter_arrays, study_model
from common.study import InitialWeights, Study

LARGEST = 4 << 30  # bytes
_CHECKPOINT = "parameters/"  # before the names of a checkpoint's parameters
_KINDS = ("float16", "float32", "float64")


def read_initial(study: Study, path: Path | None) -> bytes | None:
    """The file's content if it is the one that the study names, and fits its model; None if it names none.

    Raises:
        StudyError: if there is a file and none is named, or the other way round; if it is another file, or
            no safetensors file, or its names, shapes, types or numbers aren't the model's.
    """
    named = study.model.initial_weights
    if named is None:
        if path is not None:
            raise StudyError(
                f"{path}: the study {study.name} names no initial weights",
                remedy="leave --initial out, or give the study model.initial_weights",
            )
        return None
    if path is None:
        told = f" ({named.label})" if named.label else ""
        raise StudyError(
            f"the study {study.name} begins with the weights of a file{told}, SHA-256 {named.sha256}",
            remedy="give that file: --initial FILE.safetensors",
        )
    content = read_bounded(path, StudyError, LARGEST)
    initial_parameters(study, 0, content)
    return content


def initial_parameters(study: Study, seed: int, content: bytes | None = None) -> dict[str, Array]:
    """What a study's model begins with, name → float32 array.

    Args:
        seed: of what the file doesn't hold; public, it protects nobody.
        content: of the file that `model.initial_weights` names; parameters may be named as in the model, or
            as in a coordinator's checkpoint (`parameters/…`).

    Raises:
        StudyError: as `read_initial`.
    """
    drawn = parameter_arrays(study_model(study, seed))
    named = study.model.initial_weights
    if named is None:
        return drawn
    found = _read(named, content)
    same = {name for name, array in drawn.items() if name in found and found[name].shape == array.shape}
    _refuse_unfit(study, drawn, found, same)
    for name in same:
        array = found[name]
        if str(array.dtype) not in _KINDS:
            raise _unfit(f"{name} is {array.dtype}", "save it as float32")
        with np.errstate(over="ignore"):
            drawn[name] = np.ascontiguousarray(array, dtype=np.float32)
        if not np.isfinite(drawn[name]).all():
            raise _unfit(f"{name} holds NaN or infinity", "give sound weights")
    return drawn


def _read(named: InitialWeights, content: bytes | None) -> Arrays:
    digest = hashlib.sha256(content or b"").hexdigest()
    if digest != named.sha256:
        raise _unfit(f"SHA-256 {digest}, not {named.sha256}", "give the file that the study names")
    try:
        found = load(content or b"")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        raise _unfit(
            "no safetensors file, or of types that numpy lacks", "save it by the library safetensors, float32"
        ) from None
    if any(name.startswith(_CHECKPOINT) for name in found):
        return {n.removeprefix(_CHECKPOINT): a for n, a in found.items() if n.startswith(_CHECKPOINT)}
    return found


def _refuse_unfit(study: Study, drawn: Arrays, found: Arrays, same: set[str]) -> None:
    other = [
        f"{n} is {list(found[n].shape)}, not {list(a.shape)}"
        for n, a in drawn.items()
        if n in found and n not in same
    ]
    absent, more = sorted(drawn.keys() - found.keys()), sorted(found.keys() - drawn.keys())
    lines = other[:5] + [f"lacks {n}" for n in absent[:5]] + [f"has {n}, too" for n in more[:5]]
    named = study.model.initial_weights
    if named is not None and named.strict and lines:
        raise _unfit(
            f"{'; '.join(lines)}: not the model's names and shapes",
            "give the file of this model, or strict = false, and what differs begins at random",
        )
    if not same:
        raise _unfit("no parameter of the model is in it", f"name them {', '.join(sorted(drawn)[:5])} …")
    lost = sorted(n for n in drawn if study.model.freezes(n) and n not in same)
    if lost:
        raise _unfit(f"frozen, and not in it: {', '.join(lost[:5])}", "leave them out of model.frozen")


def _unfit(what: str, remedy: str) -> StudyError:
    return StudyError(f"initial weights: {what}", remedy=remedy)
