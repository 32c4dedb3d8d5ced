"""Models for molecules. A fingerprint is a row of numbers, which `mlp` and the linear models take."""

from __future__ import annotations

from torch import nn

from common.models.registry import Hidden, Shape, register
from common.models.sequence import State
from common.models.text import Width, token_gru, tokens


@register("smiles-gru")
def smiles_gru(shape: Shape, width: Width = 32, hidden: Hidden = 64, state: State = "last") -> nn.Module:
    """Gated recurrent units along a molecule's SMILES, as Gómez-Bombarelli et al. 2018 (arXiv 1610.02415)
    read it, and the outputs from the state at its last token, or from the mean over its tokens."""
    return token_gru(shape, tokens(shape, "molecule"), width, hidden, state)
