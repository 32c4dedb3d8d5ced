"""torch's LSTM, GRU and RNN: cells (`cells`) for each layer and direction, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from client.rowwise import VECTOR
from client.taps.cells import GRU, LSTM, RNN, TILE, Keep, Tensor, Weights
from client.taps.layers import Forward, Slots, present
from client.taps.parts import Slot
from client.taps.rows import Rows
from client.taps.tape import Tape
from common.errors import StudyError


def recurrent(name: str, layer: nn.RNNBase, slots: Slots, tape: Tape) -> Forward:
    """The same as `layer`'s own forward function, without packed sequences."""
    lstm = isinstance(layer, nn.LSTM)
    directions = 2 if layer.bidirectional else 1

    def parameters(level: int, direction: int) -> list[nn.Parameter | None]:
        ending = f"_l{level}" + ("_reverse" if direction else "")
        return [
            getattr(layer, f"{kind}{ending}", None)
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]

    own = [
        parameters(level, direction) for level in range(layer.num_layers) for direction in range(directions)
    ]
    places = [[slots(p) for p in each] for each in own]

    def run(index: int, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Outputs [time, records, hidden] and the last cell state of x [time, records, inputs]."""
        hidden, spare = layer.hidden_size, -layer.hidden_size % VECTOR
        matrices = [p.detach() for p in own[index][:2] if p is not None]
        nothing = h.new_zeros(len(matrices[0]))
        biases = [nothing if p is None else p.detach() for p in own[index][2:]]
        weights = (matrices[0], matrices[1], biases[0], biases[1])
        keep = _keep(tape, places[index], hidden, lstm)
        if not spare:
            return step(x, h, c, weights, keep)
        weights = (
            _wider(weights[0], hidden, spare),
            functional.pad(_wider(weights[1], hidden, spare), (0, spare)),
            _wider(weights[2], hidden, spare),
            _wider(weights[3], hidden, spare),
        )
        h, c = functional.pad(h, (0, spare)), None if c is None else functional.pad(c, (0, spare))
        hs, last = step(x, h, c, weights, keep)
        return hs[..., :hidden], None if last is None else last[..., :hidden]

    def step(
        x: Tensor, h: Tensor, c: Tensor | None, weights: Weights, keep: Keep
    ) -> tuple[Tensor, Tensor | None]:
        if c is not None:
            hs, last = LSTM.apply(tape.anchor, x, h, c, weights, keep)
            return hs, last
        if isinstance(layer, nn.GRU):
            return GRU.apply(tape.anchor, x, h, weights, keep)[0], None
        return RNN.apply(tape.anchor, x, h, weights, keep, layer.nonlinearity == "tanh")[0], None

    def forward(input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise StudyError(
                f"layer {name}: it takes packed or single sequences",
                remedy="give it the batch as one tensor of three dimensions",
            )
        x = input.transpose(0, 1) if layer.batch_first else input
        if torch.is_grad_enabled():
            tape.check(name, x.transpose(0, 1))
        records, spare = x.shape[1], -x.shape[1] % TILE
        x = functional.pad(x, (0, 0, 0, spare)) if spare else x
        states: list[Tensor] = [x.new_zeros(len(own), x.shape[1], layer.hidden_size)] * (1 + lstm)
        if hx is not None:
            states = [functional.pad(s, (0, 0, 0, spare)) for s in (hx if lstm else (hx,))]
        h, c = states[0], states[1] if lstm else None
        ends_h, ends_c = [], []
        for level in range(layer.num_layers):
            outputs = []
            for direction in range(directions):
                index = level * directions + direction
                found, end = run(
                    index, x.flip(0) if direction else x, h[index], None if c is None else c[index]
                )
                ends_h.append(found[-1])
                if end is not None:
                    ends_c.append(end)
                outputs.append(found.flip(0) if direction else found)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
            if layer.dropout and level + 1 < layer.num_layers:
                x = functional.dropout(x, layer.dropout, layer.training)
        x = x[:, :records]
        ends: Any = torch.stack(ends_h)[:, :records]
        if lstm:
            ends = ends, torch.stack(ends_c)[:, :records]
        return (x.transpose(0, 1) if layer.batch_first else x), ends

    return forward


def _wider(gates: Tensor, hidden: int, spare: int) -> Tensor:
    """[gates · (hidden + spare), …] of [gates · hidden, …], with zeros."""
    apart = gates.unflatten(0, (-1, hidden))
    return functional.pad(apart, (0, 0) * (apart.dim() - 2) + (0, spare)).flatten(0, 1)


def _narrower(gates: Tensor, hidden: int, width: int) -> Tensor:
    """[…, gates · hidden] of [… , gates · width]."""
    return gates if hidden == width else gates.unflatten(2, (-1, width))[..., :hidden].flatten(2)


def _keep(tape: Tape, places: list[Slot | None], hidden: int, lstm: bool) -> Keep:
    weight, state_weight, bias, state_bias = places

    def keep(x: Tensor, states: Tensor, of_x: Tensor, of_states: Tensor | None) -> None:
        kept, width = slice(tape.records), states.shape[2]
        x, states, of_x = x[kept], states[kept, :, :hidden], _narrower(of_x[kept], hidden, width)
        if of_states is None and weight is not None and state_weight is not None:
            both = torch.cat((x, states), dim=2)
            add((weight, state_weight), present(bias, state_bias), both, of_x)
            return
        of_states = of_x if of_states is None else _narrower(of_states[kept], hidden, width)
        add(present(weight), present(bias), x, of_x)
        add(present(state_weight), present(state_bias), states, of_states)

    def add(weights: Sequence[Slot], biases: Sequence[Slot], inputs: Tensor, outputs: Tensor) -> None:
        if weights or biases:
            # The LSTM's gate o comes last in torch's weights
            tape.parts.append(Rows(weights, biases, inputs, outputs, turned=hidden if lstm else 0))

    return keep
