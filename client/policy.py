"""What a site's operator allows: the content of policy.toml. Absent, nothing is allowed."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from common.errors import NotApproved, PolicyForbids, Refused, SiteError
from common.fields import ClippingNorm, Digest
from common.files import Strict, canonical_json, validated
from common.privacy.filter import PrivacyFilter, privacy_filter
from common.privacy.plan import Limits, StudyPlan
from common.study import Study

Release = Literal["training", "evaluation", "statistics"]
EVERY_RELEASE: tuple[Release, ...] = ("training", "evaluation", "statistics")


class CohortBudget(Strict):
    """What all studies, statistics and evaluations together may ever cost a patient of this site."""

    epsilon: Annotated[float, Field(gt=0, le=1000)]
    delta: Annotated[float, Field(gt=0, lt=0.1)]

    def filter(self) -> PrivacyFilter:
        """What enforces it."""
        return privacy_filter(self.epsilon, self.delta)


class Floors(Strict):
    """What no study may fall short of, whatever it asks.

    Attributes:
        noise_multiplier: a training step has at least so much noise; the site adds more by itself.
        clipping_norm: a patient's gradient is clipped to at most this norm.
        public_size: the site takes part only while it declares at least so many patients.
        patients_per_step: so many patients are expected in a training step.
        unit: what is protected.
        minimum_patients: statistics of fewer patients, by their noised count, stay.
    """

    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clipping_norm: ClippingNorm | None = None
    public_size: Annotated[int, Field(ge=1)] = 1
    patients_per_step: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    unit: Literal["patient"] = "patient"
    minimum_patients: Annotated[int, Field(ge=1)] = 10


class Approval(Strict):
    """One study that may run here.

    Attributes:
        epsilon, delta: the most that all sessions of this study together may spend per patient.
        session_epsilon, session_delta: the most for one session's rounds, and for its statistics, where
            that is less than the study asks: the site then adds more noise.
        public: the records that this study uses are published anyway, so exact metrics, and training
            without privacy, harm nobody. Never true for a hospital's own patients.
        approved_by: the role that answered for it.
        valid_from, valid_until: with time zone; None = from now on, for ever.
        revoked_at: from then on it counts no more.
    """

    study: str
    digest: Digest
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    session_epsilon: Annotated[float, Field(gt=0)] | None = None
    session_delta: Annotated[float, Field(gt=0, lt=0.1)] | None = None
    public: bool = False
    approved_by: str
    approved_at: AwareDatetime
    valid_from: AwareDatetime | None = None
    valid_until: AwareDatetime | None = None
    revoked_by: str | None = None
    revoked_at: AwareDatetime | None = None

    def refuse_unprotected(self, what: str) -> None:
        """Raises:
        Refused: unless the study's records are public anyway.
        """
        if not self.public:
            raise Refused(
                f"{what} is allowed on public cohorts only, and this one is not",
                remedy='use privacy.mode = "patient-dp" and private metrics',
            )


class Policy(Strict):
    """The content of policy.toml.

    Attributes:
        cohort: the lifetime budget; without one nothing private may be approved.
        releases: what may leave at all.
        secure_aggregation: `required` refuses updates that the coordinator could see singly.
    """

    cohort: CohortBudget | None = None
    floors: Floors = Floors()
    releases: tuple[Release, ...] = EVERY_RELEASE
    secure_aggregation: Literal["optional", "required"] = "optional"
    approved: tuple[Approval, ...] = ()

    @property
    def content(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's canonical form."""
        return hashlib.sha256(canonical_json(self.content)).hexdigest()

    def standing(self, digest: str) -> Approval | None:
        """The approval of a study that nobody has revoked, whether or not its time has come."""
        return next((a for a in self.approved if a.digest == digest and a.revoked_at is None), None)

    def approval(self, digest: str, now: float | None = None, latest: float | None = None) -> Approval:
        """The approval of a study that counts now.

        Args:
            now: seconds since 1970; None looks at no dates.
            latest: the latest time that was seen, for what has ended; `now` if absent.

        Raises:
            NotApproved: if there is none.
        """
        found = self.standing(digest)
        if found is None:
            raise NotApproved(
                f"study {digest[:12]} is not approved at this site",
                remedy="its operator approves studies: fedward-site approve FOLDER STUDY",
            )
        if now is not None and (found.valid_from or found.valid_until):
            moment = datetime.fromtimestamp(now, UTC)
            last = datetime.fromtimestamp(now if latest is None else latest, UTC)
            if moment < (found.valid_from or moment) or last > (found.valid_until or last):
                raise NotApproved(
                    f"the approval of study {digest[:12]} is not valid at this time",
                    remedy="its operator may approve it anew: fedward-site revoke, then approve",
                )
        return found

    def limits(self, approval: Approval) -> Limits:
        """What a plan must keep to."""
        return Limits(
            epsilon=approval.session_epsilon,
            delta=approval.session_delta,
            clipping_norm=self.floors.clipping_norm,
            noise_multiplier=self.floors.noise_multiplier,
        )

    def refuse_below_floors(self, study: Study, plan: StudyPlan, public_size: int) -> None:
        """Hold a study against the floors that more noise doesn't mend.

        Raises:
            PolicyForbids: naming the floor.
        """
        floors = self.floors
        if public_size < floors.public_size:
            self._forbid(f"a public size of {public_size}, and {floors.public_size} is the least")
        if study.private and plan.step.divisor < floors.patients_per_step:
            self._forbid(
                f"{plan.step.divisor:g} patients a step, and {floors.patients_per_step:g} is the least"
            )
        if self.secure_aggregation == "required":
            self._forbid("updates without secure aggregation")

    def refuse_release(self, release: Release) -> None:
        """Raises:
        PolicyForbids: if nothing of the kind may leave.
        """
        if release not in self.releases:
            self._forbid(f"the release of {release}")

    def _forbid(self, what: str) -> None:
        raise PolicyForbids(f"this site's policy forbids {what}", remedy="ask the site's privacy officer")


def approval_of(
    study: Study, by: str, *, sessions: int = 1, descriptions: int | None = None, **details: Any
) -> Approval:
    """An approval that lasts for so many sessions, as the study asks or as `details` cap them.

    Args:
        sessions: of training, with their statistics where the study scales by moments.
        descriptions: further sessions of statistics alone; None = one, if the study asks for statistics.
        details: fields of `Approval`.

    Raises:
        SiteError: if a value is wrong.
    """
    cap_epsilon, cap_delta = details.get("session_epsilon"), details.get("session_delta")
    scaled = sessions * (study.data.scaling == "moments")
    surveys = (scaled + (1 if descriptions is None else descriptions)) * (study.statistics is not None)
    parts = [(sessions, study.privacy), (surveys, study.statistics)]
    epsilon = sum(n * min(p.epsilon, cap_epsilon or p.epsilon) for n, p in parts if p and p.epsilon)
    delta = sum(n * min(p.delta, cap_delta or p.delta) for n, p in parts if p and p.delta)
    value = {
        "study": study.name,
        "digest": study.digest,
        "epsilon": epsilon or None,
        "delta": delta or None,
        "approved_by": by,
        "approved_at": datetime.now(UTC).replace(microsecond=0),
        **details,
    }
    return validated(Approval, value, "approval", SiteError)
