"""The study file: everything scientific about a study, in one TOML file.

`Study.digest` (SHA-256 of the canonical form) names a study in approvals, ledgers, messages and
certificates. A study never names a path, a site or a noise multiplier: where data lies and how much
privacy may be spent is the site's to say, and noise is calibrated at the site.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from common.columns import CategoricalColumn, NumericColumn
from common.dictionary import Data
from common.errors import StudyError
from common.fields import ClippingNorm, Digest, Finite, Fraction, Name, Positive, Slug
from common.files import Strict, canonical_json, parse_config, read_bounded, validated

MOST_GROUPS = 32


class InitialWeights(Strict):
    """What training begins with, instead of weights drawn at random. The study names a safetensors file by
    its digest; the coordinator has the file (common/models/initial).

    Attributes:
        sha256: of the file.
        label: what it holds and where it comes from, for people.
        strict: the file's names and shapes are those of the model, all of them. If not, what it lacks, or
            has in another shape, begins at random (a head for other classes), and what is too much is left.
    """

    sha256: Digest
    label: Annotated[str, Field(max_length=500)] = ""
    strict: bool = True


class Model(Strict):
    """A registered model and its own parameters (common/models says which).

    Attributes:
        frozen: parameters that stay as they begin: all whose name is one of these, or goes on from it after
            a dot (`stem`, `stages.0`). They are neither clipped nor noised.
    """

    name: Slug
    parameters: dict[str, Any] = Field(default_factory=dict)
    initial_weights: InitialWeights | None = None
    frozen: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=1024)] = ()

    def freezes(self, parameter: str) -> bool:
        """Whether the study says that this parameter stays as it is."""
        return any(parameter == name or parameter.startswith(f"{name}.") for name in self.frozen)


LOSSES = {
    "binary": ("cross-entropy", "hinge"),
    "multi-class": ("cross-entropy", "hinge"),
    "multi-label": ("cross-entropy",),
    "regression": ("squared", "absolute", "quantile"),
    "survival": ("hazard",),
}


class Objective(Strict):
    """What the model is trained for.

    Attributes:
        loss: of one record (common/objectives). Where absent, the first that the task takes.
        quantiles: that the loss `quantile` learns, rising, one output each; the one nearest to 0.5 is the
            prediction, the outermost two are an interval.
    """

    task: Literal["binary", "multi-class", "multi-label", "regression", "survival"]
    loss: Literal["cross-entropy", "hinge", "squared", "absolute", "quantile", "hazard"] = "cross-entropy"
    quantiles: Annotated[tuple[Fraction, ...], Field(max_length=32)] = ()

    @model_validator(mode="before")
    @classmethod
    def _usual_loss(cls, value: Any) -> Any:
        if isinstance(value, dict) and str(value.get("task")) in LOSSES:
            return {"loss": LOSSES[str(value["task"])][0], **value}
        return value

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        fitting = LOSSES[self.task]
        if self.loss not in fitting:
            raise ValueError(f"objective: {self.task} takes the loss {' or '.join(fitting)}, not {self.loss}")
        if (self.loss == "quantile") != bool(self.quantiles):
            raise ValueError('objective: give quantiles with the loss "quantile", and only then')
        if any(a >= b for a, b in pairwise(self.quantiles)):
            raise ValueError(f"objective: quantiles must rise, got {list(self.quantiles)}")
        return self


class Optimizer(Strict):
    name: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Training(Strict):
    """A site's work in one round.

    Give one of `local_steps` and `local_epochs` (an epoch is ceil(1 / sample_rate) steps), and one of
    `sample_rate` (each patient's chance to take part in a step) and `patients_per_step` (expected).

    Attributes:
        records: a patient's gradient is the `mean` or the `sum` of its records' gradients.
        max_records_per_patient: beyond it, that many are chosen at random, anew at each step.
    """

    optimizer: Optimizer
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    local_epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    patients_per_step: Annotated[int, Field(ge=1)] | None = None
    records: Literal["mean", "sum"] = "mean"
    max_records_per_patient: Annotated[int, Field(ge=1, le=100_000)] = 1

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("training: give exactly one of local_steps and local_epochs")
        if (self.sample_rate is None) == (self.patients_per_step is None):
            raise ValueError("training: give exactly one of sample_rate and patients_per_step")
        return self


class Privacy(Strict):
    """The target that each site calibrates its own noise to, for the whole study.

    `patient-dp`: (epsilon, delta) differential privacy, unit = patient, add/remove one patient.
    `none`: no protection; a deployed site refuses unless its policy says the cohort is public anyway.

    Attributes:
        reply_seconds: a deployed site answers a multiple of so many seconds after it was asked, so that
            the time tells little about its data; 0 = as soon as it can.
    """

    mode: Literal["patient-dp", "none"]
    epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    delta: Annotated[float, Field(gt=0, lt=0.1)] | None = None
    clipping_norm: ClippingNorm | None = None
    reply_seconds: Annotated[float, Field(ge=0, le=3600)] = 0.0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = [v is not None for v in (self.epsilon, self.delta, self.clipping_norm)]
        if (self.mode == "patient-dp") != all(given) or (self.mode == "none" and any(given)):
            raise ValueError(
                'privacy: mode = "patient-dp" needs epsilon, delta and clipping_norm; mode = "none" has none'
            )
        return self


class Statistics(Strict):
    """Differentially private statistics of the cohort, for its description and for scaling by moments.

    They are charged besides the privacy target: ε and δ of both add up.

    Attributes:
        epsilon, delta: what one description costs each patient.
        bins: cells of a numeric column's histogram over its range; even.
    """

    epsilon: Annotated[float, Field(gt=0, le=100)]
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    bins: Annotated[int, Field(ge=2, le=1000, multiple_of=2)] = 20


class Algorithm(Strict):
    """How the coordinator combines the sites' updates.

    Attributes:
        rounds: so few that a session's certificate, which lists them all, stays readable.
    """

    name: Literal["fedavg"] = "fedavg"
    rounds: Annotated[int, Field(ge=1, le=5_000)]
    server_learning_rate: Positive = 1.0


class Evaluation(Strict):
    """What a site tells about the test patients, as noised histograms (common/histograms).

    The test patients are disjoint from the training patients, so the privacy target holds for each
    group on its own (parallel composition).

    Attributes:
        every: evaluate the global model every so many rounds, besides the end; 0 = at the end only.
        bins: number of score bins in [0, 1]; even, so that 0.5 is an edge. In regression: of bins of the
            signed error, over the width of the label's range to either side. In survival: of bins of the
            risk, and about so many cells of time, so that noise grows faster with it (common/survival).
        horizons: survival: when the Brier score is taken; ends of the label's intervals. None: the last.
        tolerance: regression: also tell how many are predicted to within this share of their label's value,
            such as 0.2 of a dose.
        subgroups: categorical columns by whose codes the metrics are also told, of 32 codes at most. With
            n of them, noise grows by √(1 + n), because a patient counts in each.
        bands: numeric column → where its bands begin, but the first one's: `age = [40, 60]` also tells the
            metrics of below 40, 40 to 60, and 60 and above. Each counts as a subgroup column.
        final_share: the share of the evaluations' Gaussian budget (μ² = Σ 1 / noise_multiplier²) that the
            final one gets; the others share the rest equally. None: all get the same.
    """

    every: Annotated[int, Field(ge=0)] = 0
    bins: Annotated[int, Field(ge=2, le=1000, multiple_of=2)] = 10
    subgroups: Annotated[tuple[Name, ...], Field(max_length=4)] = ()
    horizons: Annotated[tuple[Finite, ...], Field(max_length=3)] = ()
    tolerance: Fraction | None = None
    bands: Annotated[
        dict[Name, Annotated[tuple[Finite, ...], Field(min_length=1, max_length=31)]], Field(max_length=4)
    ] = Field(default_factory=dict)
    final_share: Fraction | None = None


class Study(Strict):
    """A study as read from its file. Immutable; equal studies have equal digests."""

    format: Literal[1] = 1
    name: Slug
    title: str
    description: str = ""
    data: Data
    model: Model
    objective: Objective
    algorithm: Algorithm
    training: Training
    privacy: Privacy
    statistics: Statistics | None = None
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        fitting = {"regression": "number", "multi-label": "several", "survival": "survival"}
        if self.data.label.kind != fitting.get(self.objective.task, "class"):
            raise ValueError(
                "objective: regression needs a label with range and unit, multi-label one with columns, "
                "survival one with event, range and unit, the others classes"
            )
        if self.objective.task == "binary" and len(self.data.label.classes) != 2:
            raise ValueError(f"objective: binary needs 2 label classes, got {len(self.data.label.classes)}")
        if self.data.scaling == "moments" and self.statistics is None:
            raise ValueError('data: scaling = "moments" needs a [statistics] table with epsilon and delta')
        return self

    @model_validator(mode="after")
    def _subgroups_are_codes(self) -> Self:
        names = self.evaluation.subgroups
        if len(set(names)) != len(names):
            raise ValueError("evaluation: subgroups name a column twice")
        coded = {c.name: len(c.codes) for c in self.data.columns if isinstance(c, CategoricalColumn)}
        for name in names:
            if not 0 < coded.get(name, 0) <= MOST_GROUPS:
                raise ValueError(
                    f"evaluation: subgroup {name} is not a categorical column of {MOST_GROUPS} codes at most"
                )
        numbers = {c.name: c for c in self.data.columns if isinstance(c, NumericColumn) and c.repeat == 1}
        for name, starts in self.evaluation.bands.items():
            if name not in numbers:
                raise ValueError(f"evaluation: bands of {name}, which is no single numeric column")
            if any(a >= b for a, b in pairwise(starts)):
                raise ValueError(f"evaluation: bands of {name} must rise, got {list(starts)}")
        return self

    @model_validator(mode="after")
    def _tolerance_is_of_numbers(self) -> Self:
        if self.evaluation.tolerance is not None and self.objective.task != "regression":
            raise ValueError("evaluation: tolerance is for regression")
        return self

    @model_validator(mode="after")
    def _horizons_are_cuts(self) -> Self:
        if not self.evaluation.horizons:
            return self
        if self.objective.task != "survival":
            raise ValueError("evaluation: horizons are for survival studies")
        edges = self.data.label.edges[1:]
        strange = [h for h in self.evaluation.horizons if h not in edges]
        if strange or any(a >= b for a, b in pairwise(self.evaluation.horizons)):
            raise ValueError(
                f"evaluation: horizons must rise and be ends of the label's intervals, which are "
                f"{', '.join(f'{edge:g}' for edge in edges)}"
            )
        return self

    @property
    def horizons(self) -> tuple[float, ...]:
        """In survival studies the times at which the Brier score is taken, in the label's unit."""
        if self.objective.task != "survival":
            return ()
        return self.evaluation.horizons or self.data.label.edges[-1:]

    @property
    def subgroup_columns(self) -> tuple[CategoricalColumn, ...]:
        """The columns that `evaluation.subgroups` names, in that order; then those of `evaluation.bands`, by
        name, each band a code."""
        if not self.evaluation.subgroups and not self.evaluation.bands:
            return ()
        coded = {c.name: c for c in self.data.columns if isinstance(c, CategoricalColumn)}
        units = {c.name: c.unit for c in self.data.columns if isinstance(c, NumericColumn)}
        bands = [_banded(n, s, units[n]) for n, s in sorted(self.evaluation.bands.items())]
        return (*(coded[name] for name in self.evaluation.subgroups), *bands)

    @cached_property
    def canonical(self) -> bytes:
        """The study as canonical JSON, defaults filled in."""
        return canonical_json(self.model_dump(mode="json"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `canonical`, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def private(self) -> bool:
        return self.privacy.mode == "patient-dp"

    @property
    def outputs(self) -> int:
        """Width of the model's last layer: 1 logit in binary studies, 1 number in regression or one for each
        quantile, else one logit per class, label or interval of time."""
        label, task = self.data.label, self.objective.task
        if task == "multi-class":
            return len(label.classes)
        if task == "multi-label":
            return len(label.columns)
        return max(1, len(label.edges) - 1 if task == "survival" else len(self.objective.quantiles))

    @property
    def evaluations(self) -> int:
        """How many times the whole study evaluates the global model, the end included."""
        return sum(self.evaluates_in(r) for r in range(1, self.algorithm.rounds + 2))

    def evaluates_in(self, round_number: int) -> bool:
        """Whether round `round_number` (1 …) also evaluates; round `rounds + 1` evaluates only."""
        if round_number == self.algorithm.rounds + 1:
            return True
        every = self.evaluation.every
        return every > 0 and round_number > 1 and (round_number - 1) % every == 0

    def public_training_size(self, public_size: int) -> int:
        """Training patients that the site's public size stands for, at least 1."""
        return max(1, math.floor(public_size * (1 - self.data.split.test_fraction) + 1e-9))


def _banded(name: str, starts: Sequence[float], unit: str) -> CategoricalColumn:
    shown = "" if unit == "1" else f" {unit}"
    edges = [f"{start:g}" for start in starts]
    codes = {"1": f"below {edges[0]}{shown}"}
    codes |= {str(i): f"{a} to below {b}{shown}" for i, (a, b) in enumerate(pairwise(edges), start=2)}
    codes[str(len(edges) + 1)] = f"{edges[-1]}{shown} and above"
    return CategoricalColumn(kind="categorical", name=name, codes=codes)


def parse_study(content: bytes, origin: str) -> Study:
    """Read a study from TOML or canonical JSON; `origin` is how messages name it.

    Raises:
        StudyError: naming the field and the remedy.
    """
    return validated(Study, parse_config(content, origin, StudyError), origin, StudyError)


def load_study(path: Path) -> Study:
    """Read a study file (TOML, or canonical JSON).

    Raises:
        StudyError: if it is absent, unreadable or wrong, naming file, field and remedy.
    """
    return parse_study(read_bounded(path, StudyError), str(path))
