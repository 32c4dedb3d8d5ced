"""Gradients of the losses in `common.objectives` by the outputs, in closed form: cheaper than autograd's."""

from __future__ import annotations

import torch
from torch.nn import functional

from common.objectives import hazard_targets, known_labels, record_losses, sigmoid
from common.study import Objective


@torch.no_grad()
def output_gradients(
    objective: Objective, outputs: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """∂ Σ weight · loss / ∂ outputs, [records, outputs], as autograd takes it of `record_losses`.

    Args:
        labels: as of `record_losses`; [records, 1] stands for as many as there are outputs.
        weights: [records].
    """
    if objective.task == "multi-class":
        if objective.loss == "hinge":
            return _by_autograd(objective, outputs, labels, weights)
        # softmax - 1 at the label
        found = functional.softmax(outputs, dim=1)
        found.scatter_add_(1, labels[:, None], found.new_full((1, 1), -1.0).expand(len(found), 1))
        return found.mul_(weights[:, None])
    if objective.task == "multi-label":
        known, wanted = known_labels(labels, outputs)
        share = weights / known.sum(dim=1).clamp_(min=1)
        return (sigmoid(outputs.detach()) - wanted).mul_(known).mul_(share[:, None])
    if objective.task == "survival":
        at_risk, event = hazard_targets(labels, outputs)
        return (sigmoid(outputs.detach()) - event).mul_(at_risk).mul_(weights[:, None])
    if objective.loss == "quantile":
        below = (labels[:, None] < outputs.detach()).to(outputs.dtype)
        share = outputs.new_tensor(objective.quantiles)
        return (below - share).div_(len(objective.quantiles)).mul_(weights[:, None])
    first = outputs.detach()[:, 0]
    if objective.task == "binary":
        if objective.loss == "hinge":
            signs = 2 * labels - 1
            slopes = torch.where(1 - signs * first >= 0, -signs.to(first.dtype), 0.0)
        else:
            slopes = sigmoid(first).sub_(labels)
    else:
        slopes = first - labels
        slopes = slopes.sign() if objective.loss == "absolute" else slopes.mul_(2.0)
    slopes *= weights
    if outputs.shape[1] == 1:
        return slopes[:, None]
    result = torch.zeros_like(outputs)
    result[:, 0] = slopes
    return result


def _by_autograd(
    objective: Objective, outputs: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        (found,) = torch.autograd.grad(record_losses(objective, leaf, labels), leaf, weights)
    return found
