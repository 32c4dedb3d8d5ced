"""Networks that would carry data past the noise are refused; torch's own recurrent layers are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from common.errors import StudyError
from common.models.registry import refuse_unsafe


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))


UNSAFE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm2d(3), r"0 \(BatchNorm2d\) makes"),
    "batch norm without parameters": (lambda: nn.BatchNorm1d(3, affine=False), "other records"),
    "without statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), "other records"),
    "over processes": (lambda: nn.SyncBatchNorm(3), "other records"),
    "statistics": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), "keeps statistics"),
    "a buffer": (Buffered, "buffer '0.mean'"),
    "rescaled entries": (lambda: nn.Embedding(3, 2, max_norm=1.0), "rescales"),
    "rescaled bags": (lambda: nn.EmbeddingBag(3, 2, max_norm=1.0), "rescales"),
    "by frequency": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "scales gradients"),
}
SAFE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "lstm": lambda: nn.LSTM(3, 2),
    "gru": lambda: nn.GRU(3, 2, bidirectional=True),
    "rnn": lambda: nn.RNN(3, 2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "norms": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4, affine=True)),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv3d(1, 2, 3), nn.Embedding(3, 2)),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_layers_are_named(name: str) -> None:
    make, message = UNSAFE[name]
    with pytest.raises(StudyError, match=rf"model mine: .*{message}"):
        refuse_unsafe(nn.Sequential(make()), "mine")


@pytest.mark.parametrize("name", SAFE)
def test_safe_layers_pass(name: str) -> None:
    refuse_unsafe(nn.Sequential(SAFE[name]()), "mine")
