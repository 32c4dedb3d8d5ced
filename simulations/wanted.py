"""The study that a person asks for: by file or by name, with changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from common.errors import StudyError
from common.files import parse_config, validated
from common.study import Study, load_study
from simulations.studies import ready_studies, ready_study


def find_study(name: str, changes: Sequence[str] = ()) -> Study:
    """A study by file or by the name of a ready one, with `KEY=VALUE` changes (a study of its own).

    Raises:
        StudyError: if there is neither, or a change makes no sense.
    """
    found = _find_study(name)
    read = {}
    for change in changes:
        key, _, text = change.partition("=")
        try:
            read[key] = parse_config(f"value = {text}".encode(), f"--set {change}", StudyError)["value"]
        except StudyError as error:
            raise StudyError(
                error.message, remedy="write it as TOML, texts in quotes: --set 'model.name=\"mlp\"'"
            ) from None
    return varied(found, read, " ".join(["--set", *changes]))


def varied(study: Study, changes: Mapping[str, Any], origin: str) -> Study:
    """A study with changes, dotted key → value; the study itself if there are none.

    Args:
        origin: how messages name the changes.

    Raises:
        StudyError: if a key leads nowhere, or what comes out is no study.
    """
    if not changes:
        return study
    value = study.model_dump(mode="json")
    for key, new in changes.items():
        *path, last = key.split(".")
        place: Any = value
        for step in path:
            place = place.get(step) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise StudyError(f"{origin}: {key}: no such table", remedy="write --set privacy.epsilon=0.1")
        place[last] = deepcopy(new)  # a later change may go into it
    return validated(Study, value, origin, StudyError)


def _find_study(name: str) -> Study:
    path = Path(name)
    if path.exists() or path.suffix in {".toml", ".json"} or "/" in name:
        return load_study(path)
    if name not in ready_studies():
        raise StudyError(
            f"{name!r} is neither a file nor a ready study", remedy=f"ready are: {', '.join(ready_studies())}"
        )
    return load_study(ready_study(name))
