"""The rows of a table: which ways of training are compared, and the study that each one runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.errors import StudyError
from common.files import Strict, load_config
from common.study import Study
from simulations.wanted import varied

Kind = Literal["pooled", "federated", "local", "left-out"]
Epsilon = Annotated[float, Field(gt=0, le=100)]
Changes = dict[str, Any]

EPSILONS, SEEDS = (1.0, 3.0, 8.0), 5
SETTINGS = Path(__file__).parents[1] / "studies" / "tables"


class Settings(Strict):
    """How a study's rows differ from its file: what suits training under noise may not suit it without.

    Attributes:
        epsilons, seeds: of the table, unless the command says otherwise.
        columns: metrics to show, by their names in `common.metrics.Measured`; else the task's usual ones.
        plain: changes of the study in every row without privacy, dotted key → value.
        pooled, federated, local: further changes in that row (left-out sites: those of `federated`).
        private: changes in every row with privacy; `at`: further ones at one ε, e.g. `[at.1]`.
    """

    epsilons: Annotated[tuple[Epsilon, ...], Field(min_length=1)] = EPSILONS
    seeds: Annotated[int, Field(ge=1, le=1000)] = SEEDS
    columns: tuple[str, ...] = ()
    plain: Changes = Field(default_factory=dict)
    pooled: Changes = Field(default_factory=dict)
    federated: Changes = Field(default_factory=dict)
    local: Changes = Field(default_factory=dict)
    private: Changes = Field(default_factory=dict)
    at: dict[str, Changes] = Field(default_factory=dict)

    def without(self, keys: Collection[str]) -> Settings:
        """The same, but for changes of what a person has set: that holds in every row."""

        def left(changes: Changes) -> Changes:
            return {
                name: value
                for name, value in changes.items()
                if not any(name == key or name.startswith(f"{key}.") for key in keys)
            }

        rows = ("plain", "pooled", "federated", "local", "private")
        kept: dict[str, Any] = {row: left(getattr(self, row)) for row in rows}
        return self.model_copy(update={**kept, "at": {e: left(changes) for e, changes in self.at.items()}})


def settings_of(study: str, file: Path | None) -> Settings:
    """The settings in `file`; without one those that come with a ready study, else none.

    Args:
        study: its name, or its file: that has none but those in `file`.

    Raises:
        StudyError: if the file is absent or wrong.
    """
    shipped = SETTINGS / f"{study}.toml"
    if file is None and not shipped.exists():
        return Settings()
    return load_config(Settings, file or shipped, StudyError)


@dataclass(frozen=True)
class Row:
    """One way of training.

    Attributes:
        study: what it runs.
        site: the one that is left out.
    """

    kind: Kind
    study: Study
    site: str | None = None

    @property
    def name(self) -> str:
        """What a table calls it; no two rows of a table have the same name."""
        privacy = f", ε = {self.study.privacy.epsilon:g}" if self.study.private else ""
        words = {
            "pooled": "pooled",
            "federated": "federated",
            "local": "each site alone",
            "left-out": f"without {self.site}",
        }
        return words[self.kind] + privacy


def rows_of(study: Study, settings: Settings, epsilons: Sequence[float]) -> list[Row]:
    """Pooled, federated, federated with privacy at each ε, each site alone.

    Raises:
        StudyError: if a change makes no sense, or privacy is asked of a study that doesn't say how.
    """
    return [
        Row("pooled", _plain(study, settings, settings.pooled)),
        Row("federated", _plain(study, settings, settings.federated)),
        *(Row("federated", _private(study, settings, epsilon)) for epsilon in epsilons),
        Row("local", _plain(study, settings, settings.local)),
    ]


def left_out_rows(
    study: Study, settings: Settings, epsilons: Sequence[float], sites: Sequence[str]
) -> list[Row]:
    """Federated with all sites, then without each one of them; the same with privacy at each ε.

    Raises:
        StudyError: as `rows_of`, or if there are fewer than two sites.
    """
    if len(sites) < 2:
        raise StudyError("one site cannot be left out of one", remedy="give a folder of two sites at least")
    variants = [_plain(study, settings, settings.federated)]
    variants += [_private(study, settings, epsilon) for epsilon in epsilons]
    rows = []
    for each in variants:
        rows.append(Row("federated", each))
        rows += [Row("left-out", each, site) for site in sites]
    return rows


def _plain(study: Study, settings: Settings, more: Mapping[str, Any]) -> Study:
    changes = {"privacy": {"mode": "none"}, **settings.plain, **more}
    return varied(study, changes, f"the table's settings of {study.name}")


def can_be_private(study: Study, settings: Settings) -> bool:
    """Whether study or settings say with which δ and clipping norm to train."""
    told = {"privacy", "privacy.delta", "privacy.clipping_norm"}
    return study.private or any(told & set(each) for each in (settings.private, *settings.at.values()))


def _private(study: Study, settings: Settings, epsilon: float) -> Study:
    if not can_be_private(study, settings):
        raise StudyError(
            f"study {study.name} has no privacy, so ε = {epsilon:g} lacks a δ and a clipping norm",
            remedy="leave --epsilon out, or give a study with privacy: "
            """--set 'privacy={mode="patient-dp",epsilon=1.0,delta=1e-4,clipping_norm=1.0}'""",
        )
    own = {"delta": study.privacy.delta, "clipping_norm": study.privacy.clipping_norm}
    privacy = {"mode": "patient-dp", "epsilon": epsilon, **own}
    more = settings.at.get(f"{epsilon:g}", {})
    changes = {"privacy": privacy, **settings.private, **more, "privacy.epsilon": epsilon}
    return varied(study, changes, f"the table's settings of {study.name} at ε = {epsilon:g}")
