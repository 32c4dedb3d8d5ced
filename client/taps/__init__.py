"""Clipped per-patient gradients from one forward and one backward pass that forms no weight gradient.

Every layer's input and output gradient are tapped. Norms per patient come from what was tapped: Goodfellow
2015 (arXiv 1510.01799) for one row a patient, Gram matrices where a patient has several (Li et al. 2021,
arXiv 2110.05679), or the patient's summed gradient, whichever is cheaper by shape (Bu et al. 2022, arXiv
2205.10683); the weighted sum then follows directly (Bu et al. 2022, arXiv 2210.00038).
"""

from client.taps.coverage import covers as covers
from client.taps.engine import TappedGradients as TappedGradients

__all__ = ["TappedGradients", "covers"]
