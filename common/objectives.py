"""Task kinds: the loss per record, which DP-SGD needs as a sum over patients, and the score."""

from __future__ import annotations

import torch
from torch.nn import functional

from common.study import Objective

_TOGETHER = 32  # numbers that go through at once, on the widest registers
_PIECE = 1 << 14  # numbers that torch leaves to one thread


def record_losses(objective: Objective, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each record, float32 [records].

    Binary (outputs [records, 1]): logistic loss, or hinge max(0, 1 - y f) with y = ±1 (Cortes & Vapnik
    1995). Multi-class (outputs [records, K]): softmax cross-entropy, or the multi-class hinge
    Σ_{j≠y} max(0, 1 - f_y + f_j) / K (Weston & Watkins 1999, scaled by K). Regression (outputs
    [records, 1]): (f - y)², or |f - y|, on the scale where the label's range is [-1, 1]. The output is not
    kept within the range here, so that one outside has a gradient that brings it back; `quantile` (outputs
    [records, Q]) is the mean over quantiles q of the pinball loss max(q e, (q - 1) e), e = y - f (Koenker &
    Bassett 1978). Multi-label (outputs [records, L]): mean of the logistic loss over the labels that the
    record has; 0 if it has none.

    Survival (outputs [records, K]): the negative log-likelihood of the patient's own time in K intervals,
    Σ over those at risk of the logistic loss of hazard logit against event (Brown 1975; Gensheimer &
    Narasimhan 2019); whom is at risk where says `common.survival.time_positions`. It is a sum over patients.
    Cox's partial likelihood is none: each event's term is a ratio of the patient's hazard to the sum of the
    hazards of all who are at risk then, so one patient enters into the terms of many others. A patient's own
    gradient doesn't exist there, and clipping would bound nothing: DP-SGD isn't valid for it.

    Args:
        labels: class indices, int64 [records]; in regression scaled numbers, float32 [records]; else float32
            [records, labels] (NaN: not known) or [records, 2] (common/encoding).
    """
    if objective.task == "multi-label":
        known, wanted = known_labels(labels, outputs)
        losses = functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
        return (losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
    if objective.task == "survival":
        at_risk, event = hazard_targets(labels, outputs)
        losses = functional.binary_cross_entropy_with_logits(outputs, event, reduction="none")
        return (losses * at_risk).sum(dim=1)
    if objective.loss == "quantile":
        error, share = labels[:, None] - outputs, outputs.new_tensor(objective.quantiles)
        return torch.maximum(share * error, (share - 1) * error).mean(dim=1)
    if objective.task == "binary":
        margin = outputs[:, 0]
        if objective.loss == "hinge":
            return (1 - (2 * labels - 1) * margin).clamp(min=0)
        return functional.binary_cross_entropy_with_logits(margin, labels.to(margin.dtype), reduction="none")
    if objective.task == "regression":
        difference = outputs[:, 0] - labels
        return difference.abs() if objective.loss == "absolute" else difference.square()
    if objective.loss == "hinge":
        return functional.multi_margin_loss(outputs, labels, reduction="none")
    return functional.cross_entropy(outputs, labels, reduction="none")


def scores(objective: Objective, outputs: torch.Tensor) -> torch.Tensor:
    """Scores in [0, 1]: of the positive class [records], or of each class or label [records, K]; in survival
    the probability to live without the event beyond each interval [records, K]. In regression the prediction
    in [-1, 1], that is within the label's range, [records], or of each quantile [records, Q].

    After a hinge loss they rank and classify as the margin does, but aren't probabilities.
    """
    if objective.task == "binary":
        return sigmoid(outputs[:, 0])
    if objective.task == "regression":
        kept = outputs.clamp(-1.0, 1.0)
        return kept if objective.loss == "quantile" else kept[:, 0]
    if objective.task == "multi-label":
        return sigmoid(outputs)
    if objective.task == "survival":
        return (1 - sigmoid(outputs)).cumprod(dim=1)
    return outputs.softmax(dim=1)


def sigmoid(values: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x), for each number the same bit for bit wherever it stands and however many there are.

    torch takes the numbers that don't fill the processor's registers in another way, which can differ in the
    last bit: one patient more would then move others' scores over the edge of a bin.
    """
    if values.numel() % _TOGETHER == 0 and values.numel() <= _PIECE and values.is_contiguous():
        return values.sigmoid()
    flat = values.flatten()
    filled = functional.pad(flat, (0, -len(flat) % _TOGETHER))
    return torch.cat([some.sigmoid() for some in torch.split(filled, _PIECE)])[: len(flat)].view(values.shape)


def known_labels(labels: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of labels float32 [records, L]: 1 where one is known, and the labels with 0 where none is; both like
    the outputs [records, L]."""
    known = ~labels.isnan()
    found = known, torch.where(known, labels, 0.0)
    return found[0].to(outputs.dtype).expand_as(outputs), found[1].to(outputs.dtype).expand_as(outputs)


def hazard_targets(labels: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of labels float32 [records, 2] (`common.survival.time_positions`): 1 where the patient is at risk in an
    interval, and 1 where it has the event there; both like the outputs [records, intervals].

    Who is censored within an interval was at risk in it after half of it (Gensheimer & Narasimhan 2019).
    """
    interval = torch.arange(outputs.shape[1], device=labels.device, dtype=labels.dtype)
    position, seen = labels[:, :1], labels[:, 1:] > 0
    # an interval holds its end and not its start, but for the first, which holds both
    inside = (position > interval) | (interval == 0)
    at_risk = torch.where(seen, inside, position >= interval + 0.5)
    event = seen & inside & (position <= interval + 1)
    return at_risk.to(outputs.dtype), event.to(outputs.dtype)


def tried_objective(objective: Objective) -> Objective:
    """What a network is tried with in the place of `objective`: the same task, with a loss that has a
    gradient everywhere. A hinge's is zero where the margin is wide, and zeros would tell nothing."""
    return Objective(task=objective.task) if objective.loss == "hinge" else objective


def blank_labels(objective: Objective, records: int, device: torch.device) -> torch.Tensor:
    """Labels of the right type that are nobody's, for trying a network: [records] or [records, …]. Whatever
    the outputs, each has a gradient by them, unless the loss is a hinge (see `tried_objective`)."""
    if objective.task in ("binary", "multi-class"):
        return torch.zeros(records, dtype=torch.int64, device=device)
    if objective.task == "regression":
        return torch.zeros(records, device=device)
    if objective.task == "multi-label":  # the same one for all labels
        return torch.zeros((records, 1), device=device)
    return torch.tensor([[1e6, 0.0]], device=device).repeat(records, 1)  # censored after all intervals
