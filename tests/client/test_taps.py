"""Taps against a loop over records: every layer, frozen and shared ones, many records, no records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tapped import (
    OBJECTIVE,
    OUTPUTS,
    assert_exact,
    cohort_of,
    everybody,
    one_thread,
)
from torch import nn

from client.taps import TappedGradients, covers
from client.taps.parts import Norms


class Mean(nn.Module):
    """The mean over all but the first and one other dimension."""

    def __init__(self, kept: int = 1) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(self.kept, 1).flatten(2).mean(dim=2)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase, start: bool = False, ends: bool = False) -> None:
        super().__init__()
        self.layer, self.ends = layer, ends
        width = layer.hidden_size * (2 if layer.bidirectional else 1)
        self.start = nn.Linear(4, layer.hidden_size) if start else None
        self.head = nn.Linear(width, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = None
        if self.start is not None:
            h = self.start(x[:, 0])[None].expand(self.layer.num_layers, -1, -1)
            first = (h, h.tanh()) if isinstance(self.layer, nn.LSTM) else h
        y, end = self.layer(x if self.layer.batch_first else x.transpose(0, 1), first)
        if self.ends:
            cells = end[0] + end[1] if isinstance(self.layer, nn.LSTM) else end
            return self.head(cells[-1].repeat(1, 2 if self.layer.bidirectional else 1))
        y = y if self.layer.batch_first else y.transpose(0, 1)
        return self.head(y[:, -1] + y[:, 1].square())


class Attending(nn.Module):
    def __init__(self, cross: bool = False, masks: str = "", weights: bool = False, **changes: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **changes)
        self.cross, self.masks, self.weights = cross, masks, weights
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch_first = self.attention.batch_first
        more: dict[str, Any] = {"need_weights": self.weights}
        if "keys" in self.masks:
            more["key_padding_mask"] = (x[..., 0] > 1.0) & (torch.arange(x.shape[1]) > 0)
        if "pairs" in self.masks:
            more["attn_mask"] = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        if "numbers" in self.masks:
            more["attn_mask"] = torch.linspace(-1, 1, 18, dtype=x.dtype).view(2, 3, 3).repeat(len(x), 1, 1)
        other = torch.cat([x, x.tanh()], dim=1) if self.cross and "pairs" not in self.masks else x
        triple = (x, other.sin() if self.cross else x, other if self.cross else x)
        if not batch_first:
            triple = tuple(t.transpose(0, 1) for t in triple)
        y, shares = self.attention(*triple, **more)
        y = y if batch_first else y.transpose(0, 1)
        y = y.mean(dim=1)
        return self.head(y if shares is None else y + shares.square().flatten(1).mean(dim=1)[:, None])


class Twice(nn.Module):
    """One layer used twice, between others."""

    def __init__(self, layer: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.layer(self.layer(self.before(x)).tanh()))


class TiedTable(nn.Module):
    """A table of words that is the output's matrix too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(OUTPUTS, 4), nn.Linear(4, OUTPUTS)
        self.out.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(x).mean(dim=1))


def head(width: int) -> nn.Linear:
    return nn.Linear(width, OUTPUTS)


def conv(layer: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), Mean(), head(channels))


# name → network, a record's shape, tokens (None: numbers)
LAYERS: dict[str, tuple[Any, tuple[int, ...], int | None]] = {
    "linear": (lambda: head(5), (5,), None),
    "linear without bias": (lambda: nn.Linear(5, OUTPUTS, bias=False), (5,), None),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.GELU(), head(6)),
        (5,),
        None,
    ),
    "wide mlp": (lambda: nn.Sequential(nn.Linear(300, 90), nn.ReLU(), head(90)), (300,), None),
    "linear on sequences": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), Mean(2), head(4)),
        (6, 5),
        None,
    ),
    "wide linear on sequences": (
        lambda: nn.Sequential(nn.Linear(80, 90), nn.Tanh(), Mean(2), head(90)),
        (3, 80),
        None,
    ),
    "changed in place": (
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.ReLU(True), nn.Linear(7, 4), nn.ReLU(True), Mean(2), head(4)
        ),
        (6, 5),
        None,
    ),
    "conv1d, changed in place": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3), nn.ReLU(True), nn.Conv1d(4, 5, 1), nn.ReLU(True), Mean(), head(5)
        ),
        (3, 7),
        None,
    ),
    "linear on grids": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), Mean(3), head(7)), (2, 3, 5), None),
    "conv1d": (lambda: conv(nn.Conv1d(3, 4, 3, padding=1), 4), (3, 7), None),
    "conv1d, wide": (lambda: conv(nn.Conv1d(40, 50, 3, stride=2), 50), (40, 7), None),
    "conv2d": (lambda: conv(nn.Conv2d(2, 6, 3, padding=1), 6), (2, 6, 5), None),
    "conv2d, stride, dilation, groups": (
        lambda: conv(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), 6),
        (4, 7, 6),
        None,
    ),
    "conv2d, wide and small": (
        lambda: conv(nn.Conv2d(60, 70, 3, padding=1, bias=False), 70),
        (60, 2, 2),
        None,
    ),
    "conv2d, same": (
        lambda: conv(nn.Conv2d(2, 4, (4, 3), padding="same", dilation=(1, 2)), 4),
        (2, 6, 5),
        None,
    ),
    "conv2d, reflected": (
        lambda: conv(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), 4),
        (2, 6, 5),
        None,
    ),
    "conv2d, circular": (
        lambda: conv(nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), 4),
        (2, 6, 5),
        None,
    ),
    "conv3d": (lambda: conv(nn.Conv3d(2, 3, 3, stride=2, padding=1), 3), (2, 5, 4, 6), None),
    "conv3d, groups": (lambda: conv(nn.Conv3d(4, 4, (1, 2, 3), groups=4), 4), (4, 3, 4, 5), None),
    "depthwise conv after conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), conv(nn.Conv2d(4, 8, 3, groups=4), 8)),
        (2, 7, 7),
        None,
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), Mean(), head(4)),
        (2, 6, 5),
        None,
    ),
    "group norm first": (lambda: nn.Sequential(nn.GroupNorm(1, 4), head(4)), (4,), None),
    "instance norm 1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Tanh(), Mean(), head(4)
        ),
        (2, 9),
        None,
    ),
    "instance norm 2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), Mean(), head(4)
        ),
        (2, 6, 5),
        None,
    ),
    "instance norm 3d": (
        lambda: nn.Sequential(nn.InstanceNorm3d(2, affine=True), nn.Tanh(), Mean(), head(2)),
        (2, 3, 4, 3),
        None,
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), head(6)), (5,), None),
    "layer norm first": (lambda: nn.Sequential(nn.LayerNorm(5), head(5)), (5,), None),
    "layer norm on sequences": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.LayerNorm((3, 6)), nn.LayerNorm(6), nn.ReLU(), Mean(2), head(6)
        ),
        (3, 5),
        None,
    ),
    "layer norm without bias": (lambda: nn.Sequential(nn.LayerNorm(5, bias=False), head(5)), (5,), None),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), Mean(2), head(4)), (6,), 9),
    "embedding of one": (lambda: nn.Sequential(nn.Embedding(9, OUTPUTS), nn.Flatten()), (1,), 9),
    "embedding with padding": (
        lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=0), Mean(3), head(4)),
        (2, 3),
        5,
    ),
    "embedding bag, mean": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4), head(4)), (6,), 9),
    "embedding bag, sum": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum"), head(4)), (6,), 9),
    "embedding bag with padding": (
        lambda: nn.Sequential(nn.EmbeddingBag(4, 4, padding_idx=1), head(4)),
        (3,),
        4,
    ),
    "lstm": (lambda: Recurrent(nn.LSTM(4, 5, batch_first=True)), (6, 4), None),
    "lstm, deep, both ways": (lambda: Recurrent(nn.LSTM(4, 5, 2, bidirectional=True)), (6, 4), None),
    "lstm with a start": (lambda: Recurrent(nn.LSTM(4, 5, 2, bias=False), start=True), (6, 4), None),
    "lstm's ends": (
        lambda: Recurrent(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True), ends=True),
        (6, 4),
        None,
    ),
    "wide lstm, short": (lambda: Recurrent(nn.LSTM(60, 50, batch_first=True)), (2, 60), None),
    "gru": (lambda: Recurrent(nn.GRU(4, 5, batch_first=True)), (6, 4), None),
    "gru, deep, both ways": (lambda: Recurrent(nn.GRU(4, 5, 2, bidirectional=True)), (6, 4), None),
    "gru with a start": (lambda: Recurrent(nn.GRU(4, 5, 2, bias=False), start=True), (6, 4), None),
    "gru's ends": (lambda: Recurrent(nn.GRU(4, 5, batch_first=True), ends=True), (6, 4), None),
    "rnn": (lambda: Recurrent(nn.RNN(4, 5, 2, batch_first=True, bidirectional=True)), (6, 4), None),
    "rectified rnn": (lambda: Recurrent(nn.RNN(4, 5, nonlinearity="relu"), start=True), (6, 4), None),
    "attention": (lambda: Attending(batch_first=True), (3, 4), None),
    "attention with weights": (lambda: Attending(weights=True), (3, 4), None),
    "attention across": (
        lambda: Attending(cross=True, batch_first=True, bias=False, weights=True),
        (3, 4),
        None,
    ),
    "attention, other widths": (lambda: Attending(kdim=4, vdim=4, cross=True), (3, 4), None),
    "attention, masked": (lambda: Attending(masks="keys pairs", batch_first=True), (3, 4), None),
    "attention, masked by numbers": (lambda: Attending(masks="numbers", weights=True), (3, 4), None),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True),
            Mean(2),
            head(4),
        ),
        (3, 4),
        None,
    ),
    "transformer, time first": (
        lambda: nn.Sequential(
            nn.Embedding(7, 4),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), 2),
            Mean(2),
            head(4),
        ),
        (3,),
        7,
    ),
    "linear twice": (lambda: Twice(nn.Linear(4, 4), nn.Identity(), head(4)), (4,), None),
    "conv twice": (
        lambda: Twice(nn.Conv2d(2, 2, 3, padding=1), nn.Identity(), nn.Sequential(Mean(), head(2))),
        (2, 5, 4),
        None,
    ),
    "norms twice": (
        lambda: Twice(nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4)), nn.Linear(4, 4), head(4)),
        (4,),
        None,
    ),
    "lstm twice": (lambda: Recurrent(nn.LSTM(4, 4, 1, batch_first=True), start=True), (5, 4), None),
    "a table shared with the output": (TiedTable, (4,), OUTPUTS),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
__all__ = ["one_thread"]  # a fixture that pytest finds here
every_layer = pytest.mark.parametrize("name", LAYERS)


def network_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = LAYERS[name][0]()
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    return network.to(dtype)


COUNTS = {"one each": [1] * 3, "some": [1, 4, 2, 1], "equal": [3] * 2, "alone": [1], "many": [40, 2, 19]}


@every_layer
@pytest.mark.parametrize("counts", COUNTS)
def test_every_layer(name: str, counts: str) -> None:
    _, shape, tokens = LAYERS[name]
    cohort = cohort_of(COUNTS[counts], shape, 1, tokens)
    assert covers(network_of(name)) is None
    assert_exact(network_of(name), cohort, everybody(cohort, mean=counts != "some"))


@every_layer
def test_every_layer_in_float64(name: str) -> None:
    _, shape, tokens = LAYERS[name]
    cohort = cohort_of([1, 3], shape, 2, tokens, torch.float64)
    batch = everybody(cohort, dtype=torch.float64)
    assert_exact(network_of(name, torch.float64), cohort, batch, tolerance=1e-5)


@every_layer
def test_outputs_are_the_layers_own(name: str) -> None:
    """Taps leave no trace: outputs, attributes and plain gradients are as before."""
    _, shape, tokens = LAYERS[name]
    cohort = cohort_of([1, 1, 1], shape, 3, tokens)
    network = network_of(name)
    before = network(cohort.features)
    engine = TappedGradients(network, OBJECTIVE)
    with engine._taps():
        engine._tape.begin(3)
        inside = network(cohort.features)
        with torch.no_grad():
            quiet = network(cohort.features)
    engine.sum(cohort, everybody(cohort), 1.0)
    assert torch.allclose(inside, before, rtol=1e-5, atol=1e-6)
    assert torch.allclose(quiet, before, rtol=1e-5, atol=1e-6)
    assert not any("forward" in layer.__dict__ for layer in network.modules())
    network(cohort.features).sum().backward()
    assert any(p.grad is not None for p in network.parameters())


@every_layer
def test_micro_batches_and_long_patients(name: str) -> None:
    """With room for next to nothing, each record is a piece of its own."""
    _, shape, tokens = LAYERS[name]
    cohort = cohort_of([1, 3], shape, 4, tokens)
    assert_exact(network_of(name), cohort, everybody(cohort), memory=1)
    engine = TappedGradients(network_of(name), OBJECTIVE)
    record = engine._measured(cohort.features)
    assert_exact(network_of(name), cohort, everybody(cohort), memory=3 * record * 4 // 3 + 4)


@every_layer
def test_nothing_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradients of patients don't fit, norms come from some patients at a time."""
    _, shape, tokens = LAYERS[name]
    monkeypatch.setattr(Norms, "hold", lambda *_: False)
    for counts in ([1] * 2, [1, 3]):
        cohort = cohort_of(counts, shape, 5, tokens)
        assert_exact(network_of(name), cohort, everybody(cohort))


@every_layer
@pytest.mark.parametrize("frozen", [0, "all but the last", "biases"])
def test_frozen(name: str, frozen: Any) -> None:
    _, shape, tokens = LAYERS[name]
    network = network_of(name)
    parameters = list(network.parameters())
    chosen = {
        0: parameters[:1],
        "all but the last": parameters[:-1],
        "biases": [p for p in parameters if p.dim() == 1],
    }[frozen]  # fmt: skip
    for parameter in chosen:
        parameter.requires_grad_(False)
    cohort = cohort_of([1, 2], shape, 6, tokens)
    if all(not p.requires_grad for p in parameters):
        assert TappedGradients(network, OBJECTIVE).sum(cohort, everybody(cohort), 1.0).shape == (0,)
    else:
        assert_exact(network, cohort, everybody(cohort))
