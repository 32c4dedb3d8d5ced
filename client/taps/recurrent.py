"""torch's LSTM, GRU and RNN, with back-propagation through time by hand.

It leaves the gradients of all gates at all times, [records, time, gates]; the weights' gradients per patient
are products of these with the inputs and the states: a time step is a row (`rows.Rows`). Records go through
in tiles, and the state is as wide as fills the processor's vectors (see client/rowwise), with zeros in what
is spare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from client.rowwise import VECTOR, sigmoid_
from client.taps.layers import Forward, Slots, present
from client.taps.parts import Slot
from client.taps.products import rows_product, shared
from client.taps.rows import Rows
from client.taps.tape import Tape
from common.errors import StudyError

TILE = 16  # records; a batch has few, and those that fill it up cost as much as others
Tensor = torch.Tensor
Keep = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
"""Takes x, the states before each step, and the gradients of what x and these states were turned into (None:
the same); all [records, time, …]."""
Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""For x [gates, inputs], for the state [gates, hidden], and the biases [gates]."""


def _tiles(values: Tensor) -> tuple[Tensor, ...]:
    """At each time, [tiles, TILE, width] of [time, records, width]."""
    return values.view(len(values), -1, TILE, values.shape[2]).unbind()


class _Turn:
    """What the states at one time are multiplied with, [inputs, outputs].

    Attributes:
        add: (to, values, matrix, out=): to + values · matrix, of what `steps` gave.
    """

    def __init__(self, matrix: Tensor, rows: int) -> None:
        self._whole = _as_tiles_do(rows, matrix.shape[0], matrix.shape[1], torch.get_num_threads())
        self._whole &= matrix.device.type == "cpu" and matrix.dtype == torch.float32
        self.matrix = matrix if self._whole else shared(matrix, rows, TILE)
        self.add: Callable[..., Tensor] = torch.addmm if self._whole else torch.baddbmm

    def steps(self, values: Tensor) -> tuple[Tensor, ...]:
        """At each time, of [time, rows, width]."""
        return values.unbind() if self._whole else _tiles(values)


@lru_cache(maxsize=1024)
def _as_tiles_do(rows: int, inputs: int, outputs: int, threads: int) -> bool:
    """Whether one product of so many rows gives the bits of tiles; it costs less than they do."""
    random = torch.Generator().manual_seed(rows)
    start, x, matrix = (
        torch.randn(shape, generator=random) for shape in ((rows, outputs), (rows, inputs), (inputs, outputs))
    )
    tiles = torch.baddbmm(start.view(-1, TILE, outputs), x.view(-1, TILE, inputs), shared(matrix, rows, TILE))
    return torch.equal(torch.addmm(start, x, matrix), tiles.view(rows, outputs))


def _states(x: Tensor, first: Tensor) -> Tensor:
    """Room for the states before, between and after all steps; the first is filled in."""
    states = x.new_empty(len(x) + 1, *first.shape)
    states[0] = first
    return states


class _LSTM(torch.autograd.Function):
    """One direction of one layer (Hochreiter & Schmidhuber 1997); gates as o, i, f, g inside.

    tanh(x) is taken as 2 sigmoid(2x) - 1, which torch has six times as fast: the weights of g are doubled,
    without rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, h: Tensor, c: Tensor, weights: Weights, keep: Keep
    ) -> tuple[Tensor, Tensor]:
        hidden = h.shape[1]
        ours, theirs, bias_x, bias_h = (_rolled(w, hidden) for w in weights)
        doubled = ours.new_ones(4 * hidden, 1)
        doubled[3 * hidden :] = 2.0
        bias = (bias_x + bias_h).mul_(doubled[:, 0])
        gates = rows_product(x, ours * doubled, bias)  # before what the states add, then the gates
        hs, cs, tanh_c = _states(x, h), _states(x, c), x.new_empty(len(x), *h.shape)
        turn = _Turn((theirs * doubled).t().contiguous(), len(h))
        two, minus = x.new_tensor(2.0), x.new_tensor(-1.0)
        steps = zip(
            turn.steps(hs[:-1]),
            hs[1:].unbind(),
            cs[:-1].unbind(),
            cs[1:].unbind(),
            turn.steps(gates),
            gates.unbind(),
            tanh_c.unbind(),
            *(part.unbind() for part in gates.split(hidden, dim=2)),
            strict=True,
        )
        for before, after, c_before, c_after, turned, gate, t, o, i, f, g in steps:
            turn.add(turned, before, turn.matrix, out=turned)
            sigmoid_(gate)
            torch.add(minus, g, alpha=2, out=g)
            torch.mul(f, c_before, out=c_after)
            c_after.addcmul_(i, g)
            torch.mul(c_after, two, out=t)
            sigmoid_(t)
            torch.add(minus, t, alpha=2, out=t)
            torch.mul(o, t, out=after)
        ctx.save_for_backward(x, hs, cs, gates, tanh_c, ours, theirs)
        ctx.keep = keep
        return hs[1:], cs[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, hs, cs, gates, tanh_c, ours, theirs = ctx.saved_tensors
        dhs, dc = gradients[0].clone(memory_format=torch.contiguous_format), gradients[1].clone()
        after, hidden = hs[1:], dc.shape[1]
        # The gates make room for what each one's gradient is of dh (o) or of dc (i, f, g), and that for the
        # gradients
        o, i, f, g = gates.split(hidden, dim=2)
        carried = torch.addcmul(o, after, tanh_c, value=-1)  # o (1 - tanh²)
        torch.addcmul(after, after, o, value=-1, out=o)
        both = torch.mul(i, g, out=tanh_c)
        torch.addcmul(i, both, g, value=-1, out=g)
        torch.addcmul(both, both, i, value=-1, out=i)
        kept = f.contiguous()
        torch.addcmul(f, f, f, value=-1, out=f).mul_(cs[:-1])
        turn = _Turn(theirs, len(dc))
        steps = zip(
            dhs.unbind(),
            turn.steps(dhs),
            carried.unbind(),
            o.unbind(),
            gates[..., hidden:].unflatten(2, (3, hidden)).unbind(),
            kept.unbind(),
            turn.steps(gates),
            strict=True,
        )
        last: Tensor | None = None
        dc_wide = dc[:, None]
        for dh, turned, carried_t, d_o, d_c, f_t, d_t in reversed(list(steps)):
            if last is not None:
                turn.add(turned, last, turn.matrix, out=turned)
            dc.addcmul_(dh, carried_t)
            d_o.mul_(dh)
            d_c.mul_(dc_wide)
            dc.mul_(f_t)
            last = d_t
        ctx.keep(x.transpose(0, 1), hs[:-1].transpose(0, 1), gates.transpose(0, 1), None)
        dx = rows_product(gates, ours.t()) if ctx.needs_input_grad[1] else None
        first = rows_product(gates[0], theirs.t()) if ctx.needs_input_grad[2] else None
        return None, dx, first, dc, None, None


def _rolled(weight: Tensor, hidden: int) -> Tensor:
    """torch's gates i, f, g, o as o, i, f, g: three sigmoids side by side, and the three that meet dc."""
    return torch.cat((weight[3 * hidden :], weight[: 3 * hidden]))


class _GRU(torch.autograd.Function):
    """One direction of one layer (Cho et al. 2014, as cuDNN has it); gates r, z, n."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, h: Tensor, weights: Weights, keep: Keep
    ) -> tuple[Tensor]:
        hidden = h.shape[1]
        ours, theirs, bias_x, bias_h = weights
        drive, hs, turn = rows_product(x, ours, bias_x), _states(x, h), shared(theirs.t(), len(h), TILE)
        state = torch.empty_like(drive)  # what the states are turned into
        rz, n = x.new_empty(*drive.shape[:2], 2 * hidden), x.new_empty(len(x), *h.shape)
        steps = zip(
            drive[..., : 2 * hidden].unbind(),
            drive[..., 2 * hidden :].unbind(),
            _tiles(hs[:-1]),
            hs[:-1].unbind(),
            hs[1:].unbind(),
            _tiles(state),
            state[..., : 2 * hidden].unbind(),
            state[..., 2 * hidden :].unbind(),
            rz.unbind(),
            rz[..., :hidden].unbind(),
            rz[..., hidden:].unbind(),
            n.unbind(),
            strict=True,
        )
        for drive_rz, drive_n, tiles, before, after, turned, turned_rz, turned_n, rz_t, r, z, n_t in steps:
            torch.baddbmm(bias_h, tiles, turn, out=turned)
            torch.add(drive_rz, turned_rz, out=rz_t)
            sigmoid_(rz_t)
            torch.addcmul(drive_n, r, turned_n, out=n_t)
            n_t.tanh_()
            torch.lerp(n_t, before, z, out=after)
        ctx.save_for_backward(x, hs, state, rz, n, ours, theirs)
        ctx.keep = keep
        return (hs[1:],)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, hs, state, rz, n, ours, theirs = ctx.saved_tensors
        dhs = gradients[0].clone(memory_format=torch.contiguous_format)
        time, records, hidden = n.shape
        r, z = rz.split(hidden, dim=2)
        # What the gradients are of dh, at all times at once: turned r, z, n, and n's own
        slopes = x.new_empty(time, records, 3, hidden)
        own = torch.mul(n, n).neg_().add_(1.0)
        own.addcmul_(own, z, value=-1)  # (1 - z)(1 - n²)
        torch.mul(own, r, out=slopes[:, :, 2])
        torch.mul(slopes[:, :, 2], state[..., 2 * hidden :], out=slopes[:, :, 0])
        slopes[:, :, 0].addcmul_(slopes[:, :, 0], r, value=-1)
        torch.sub(hs[:-1], n, out=slopes[:, :, 1]).mul_(z)
        slopes[:, :, 1].addcmul_(slopes[:, :, 1], z, value=-1)
        d = torch.empty_like(slopes)
        flat = d.flatten(2)
        turn = shared(theirs, records, TILE)
        steps = zip(
            slopes.unbind(), z.unbind(), d.unbind(), _tiles(flat), dhs.unbind(), _tiles(dhs), strict=True
        )
        rest: tuple[Tensor, Tensor, Tensor] | None = None
        for slope, z_t, d_t, flat_t, dh, dh_tiles in reversed(list(steps)):
            if rest is not None:
                dh.addcmul_(rest[0], rest[1])
                dh_tiles.baddbmm_(rest[2], turn)
            torch.mul(slope, dh[:, None], out=d_t)
            rest = dh, z_t, flat_t
        states = flat.transpose(0, 1).contiguous()
        result = states.clone()
        torch.mul(own, dhs, out=own)
        result[..., 2 * hidden :] = own.transpose(0, 1)
        ctx.keep(x.transpose(0, 1), hs[:-1].transpose(0, 1), result, states)
        dx = rows_product(result, ours.t()).transpose(0, 1) if ctx.needs_input_grad[1] else None
        first = rows_product(flat[0], theirs.t()) + dhs[0] * z[0] if ctx.needs_input_grad[2] else None
        return None, dx, first, None, None


class _RNN(torch.autograd.Function):
    """One direction of one layer (Elman 1990); tanh or rectified."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, h: Tensor, weights: Weights, keep: Keep, tanh: bool
    ) -> tuple[Tensor]:
        ours, theirs, bias_x, bias_h = weights
        drive, hs = rows_product(x, ours, bias_x + bias_h), _states(x, h)
        turn = shared(theirs.t(), len(h), TILE)
        for drive_t, before, after in zip(_tiles(drive), _tiles(hs[:-1]), _tiles(hs[1:]), strict=True):
            torch.baddbmm(drive_t, before, turn, out=after)
            after.tanh_() if tanh else after.relu_()
        ctx.save_for_backward(x, hs, ours, theirs)
        ctx.keep, ctx.tanh = keep, tanh
        return (hs[1:],)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, hs, ours, theirs = ctx.saved_tensors
        dhs, after = gradients[0].clone(memory_format=torch.contiguous_format), hs[1:]
        slopes = after.square().neg_().add_(1.0) if ctx.tanh else (after > 0).to(after.dtype)
        d, turn = torch.empty_like(slopes), shared(theirs, hs.shape[1], TILE)
        last: Tensor | None = None
        steps = zip(_tiles(dhs), _tiles(slopes), _tiles(d), strict=True)
        for dh, slope, d_t in reversed(list(steps)):
            if last is not None:
                dh.baddbmm_(last, turn)
            torch.mul(dh, slope, out=d_t)
            last = d_t
        ctx.keep(x.transpose(0, 1), hs[:-1].transpose(0, 1), d.transpose(0, 1).contiguous(), None)
        dx = rows_product(d, ours.t()) if ctx.needs_input_grad[1] else None
        first = rows_product(d[0], theirs.t()) if ctx.needs_input_grad[2] else None
        return None, dx, first, None, None, None


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
            hs, last = _LSTM.apply(tape.anchor, x, h, c, weights, keep)
            return hs, last
        if isinstance(layer, nn.GRU):
            return _GRU.apply(tape.anchor, x, h, weights, keep)[0], None
        return _RNN.apply(tape.anchor, x, h, weights, keep, layer.nonlinearity == "tanh")[0], None

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
