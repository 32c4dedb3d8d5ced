"""The last gate: what may leave a site, and in which form."""

from __future__ import annotations

import numpy as np
import torch

from common.errors import MessageError, Refused
from common.messages import Arrays, Refusal, RefusalHeader, all_finite
from common.privacy.noise import Stream, noised
from common.privacy.plan import HistogramPlan

INNER_TROUBLE = "the site cannot do this now; its operator finds the reason in the vault's log"


def noised_histograms(exact: Arrays, plan: HistogramPlan, stream: Stream) -> dict[str, np.ndarray]:
    """Sums with Gaussian noise of noise_multiplier * sensitivity in every cell, float64.

    They are multiples of a public step (common/privacy/noise, `noised`), at most 2^-16 of the noise.

    Raises:
        ValueError: if the plan has no noise.
    """
    deviation = plan.noise_multiplier * plan.sensitivity
    return {
        name: noised(
            torch.from_numpy(np.array(array, dtype=np.float64)), deviation, stream, dtype=torch.float64
        ).numpy()
        for name, array in exact.items()
    }


def finite(update: Arrays) -> Arrays:
    """The update, unless training diverged.

    Raises:
        Refused: if any value is NaN or infinite.
    """
    if not all_finite(update):
        raise Refused(
            "local training diverged to NaN or infinity", remedy="lower the learning rate of the study"
        )
    return update


def refusal(site: str, error: Exception) -> Refusal:
    """What the coordinator is told. Only refusals, and words about the coordinator's own message, have a
    text; any other error may depend on rows, so all of them look alike."""
    if isinstance(error, Refused | MessageError):
        header = RefusalHeader(site=site, code=error.code, message=error.message, remedy=error.remedy)
    else:
        header = RefusalHeader(
            site=site, code="unavailable", message=INNER_TROUBLE, remedy="ask the site's operator"
        )
    return Refusal(header)
