"""Studies that are ready to run, one TOML file each."""

from __future__ import annotations

from pathlib import Path

from common.errors import StudyError

_FOLDER = Path(__file__).parent


def ready_studies() -> tuple[str, ...]:
    """Their names, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def ready_study(name: str) -> Path:
    """The file of a ready study.

    Raises:
        StudyError: if there is none of that name.
    """
    if name not in ready_studies():
        raise StudyError(
            f"no ready study is called {name!r}", remedy=f"choose one of {', '.join(ready_studies())}"
        )
    return _FOLDER / f"{name}.toml"
