"""Task kinds: the loss per record, which DP-SGD needs as a sum over patients, and the score."""

from __future__ import annotations

import torch
from torch.nn import functional

from common.study import Objective


def record_losses(objective: Objective, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each record, float32 [records].

    Binary (outputs [records, 1]): logistic loss, or hinge max(0, 1 - y f) with y = ±1 (Cortes & Vapnik
    1995). Multi-class (outputs [records, K]): softmax cross-entropy, or the multi-class hinge
    Σ_{j≠y} max(0, 1 - f_y + f_j) / K (Weston & Watkins 1999, scaled by K). Regression (outputs
    [records, 1]): (f - y)², or |f - y|, on the scale where the label's range is [-1, 1]. The output is not
    kept within the range here, so that one outside has a gradient that brings it back.

    Args:
        labels: class indices, int64 [records]; in regression scaled numbers, float32 [records].
    """
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
    """Scores in [0, 1]: of the positive class [records], or of each class [records, K]. In regression the
    prediction [records] in [-1, 1], that is within the label's range.

    After a hinge loss they rank and classify as the margin does, but aren't probabilities.
    """
    if objective.task == "binary":
        return outputs[:, 0].sigmoid()
    if objective.task == "regression":
        return outputs[:, 0].clamp(-1.0, 1.0)
    return outputs.softmax(dim=1)
