"""Everything that fedward raises on purpose.

FedwardError
├── StudyError            the study file is wrong, or asks for what doesn't exist
├── SiteError             site.toml, policy.toml, keys or folders of a site are wrong
├── DataError             a site's data doesn't fit the study's dictionary (stays at the site)
├── MessageError          bytes that crossed the wall are malformed
├── Refused               the vault says no; its text may be shown to the coordinator
│   ├── NotApproved       the site's operator has not approved this study
│   ├── PolicyForbids     the site's policy allows less than the study asks
│   ├── RolledBack        the site's ledger lacks an entry that the coordinator has seen
│   └── BudgetExhausted   the approval's, or the cohort's, privacy budget is spent
├── LedgerError           the ledger is corrupt, locked, or cannot be written
├── StudyFailed           the coordinator could not finish (quorum, deadline, bad updates)
├── DatasetError          a public data set cannot be fetched or isn't what its checksum says
├── DeploymentError       a server, certificate, key or port is not as it must be
└── CertificateError      a signed privacy certificate is forged, damaged or contradicts the facts

Messages carry names, counts, columns and line numbers, never a patient's values.
"""

from __future__ import annotations

from typing import ClassVar


class FedwardError(Exception):
    """A failure with a name for machines, a sentence for people and the way out.

    Attributes:
        code: stable, hyphenated name, as in `--json` output and refusals.
        exit_status: what a command exits with.
        remedy: what the reader can do about it.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class StudyError(FedwardError):
    code = "study-invalid"
    exit_status = 2


class SiteError(FedwardError):
    code = "site-invalid"
    exit_status = 3


class DataError(FedwardError):
    code = "data-invalid"
    exit_status = 4


class MessageError(FedwardError):
    code = "message-malformed"
    exit_status = 5


class Refused(FedwardError):
    code = "refused"
    exit_status = 6


class NotApproved(Refused):
    code = "not-approved"


class PolicyForbids(Refused):
    code = "policy-forbids"


class RolledBack(Refused):
    code = "ledger-rolled-back"


class BudgetExhausted(Refused):
    code = "budget-exhausted"


class LedgerError(FedwardError):
    code = "ledger"
    exit_status = 7


class StudyFailed(FedwardError):
    code = "study-failed"
    exit_status = 8


class DatasetError(FedwardError):
    code = "dataset"
    exit_status = 9


class DeploymentError(FedwardError):
    code = "deployment"
    exit_status = 10


class CertificateError(FedwardError):
    code = "certificate"
    exit_status = 11
