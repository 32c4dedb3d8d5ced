"""One direction of one layer of an LSTM, GRU or RNN, with back-propagation through time by hand.

It leaves the gradients of all gates at all times, [records, time, gates]; the weights' gradients per patient
are products of these with the inputs and the states: a time step is a row (`rows.Rows`). Records go through
in tiles, and the state is as wide as fills the processor's vectors (see client/rowwise), with zeros in what
is spare.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from client.rowwise import sigmoid_
from client.taps.products import rows_product, shared

TILE = 16  # records; a batch has few, and those that fill it up cost as much as others
Tensor = torch.Tensor
Keep = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
"""Takes x, the states before each step, and the gradients of what x and these states were turned into (None:
the same); all [records, time, …]."""
Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""For x [gates, inputs], for the state [gates, hidden], and the biases [gates]."""


class _Turn:
    """What the states at one time are multiplied with.

    Args:
        matrix: [inputs, outputs].
        rows: records.
    """

    def __init__(self, matrix: Tensor, rows: int) -> None:
        self._whole = (
            matrix.device.type == "cpu"
            and matrix.dtype == torch.float32
            and _as_tiles_do(rows, *matrix.shape, torch.get_num_threads())
        )
        self._matrix = matrix if self._whole else shared(matrix, rows, TILE)
        self._add: Callable[..., Tensor] = torch.addmm if self._whole else torch.baddbmm

    def steps(self, values: Tensor) -> tuple[Tensor, ...]:
        """At each time, of [time, rows, width]: [rows, width], or [tiles, TILE, width]."""
        return (values if self._whole else values.unflatten(1, (-1, TILE))).unbind()

    def add(self, to: Tensor, values: Tensor, out: Tensor) -> None:
        """to + values · matrix, of what `steps` gave."""
        self._add(to, values, self._matrix, out=out)


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


def _doubled(gates: Tensor, hidden: int) -> Tensor:
    """With the last gate, that of tanh, doubled; exact."""
    result = gates.clone()
    result[-hidden:] *= 2.0
    return result


class LSTM(torch.autograd.Function):
    """One direction of one layer (Hochreiter & Schmidhuber 1997); gates as o, i, f, g inside.

    tanh(x) is taken as 2 sigmoid(2x) - 1, which torch has six times as fast: the weights of g are doubled.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, h: Tensor, c: Tensor, weights: Weights, keep: Keep
    ) -> tuple[Tensor, Tensor]:
        hidden = h.shape[1]
        ours, theirs, bias_x, bias_h = (_rolled(w, hidden) for w in weights)
        # Before what the states add, then the gates
        gates = rows_product(x, _doubled(ours, hidden), _doubled(bias_x + bias_h, hidden))
        hs, cs, tanh_c = _states(x, h), _states(x, c), x.new_empty(len(x), *h.shape)
        turn = _Turn(_doubled(theirs, hidden).t().contiguous(), len(h))
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
            turn.add(turned, before, turned)
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
                turn.add(turned, last, turned)
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


class GRU(torch.autograd.Function):
    """One direction of one layer (Cho et al. 2014, as cuDNN has it); gates r, z, n.

    tanh as in `LSTM`, of n.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, h: Tensor, weights: Weights, keep: Keep
    ) -> tuple[Tensor]:
        hidden = h.shape[1]
        ours, theirs, bias_x, bias_h = weights
        drive, hs = rows_product(x, _doubled(ours, hidden), _doubled(bias_x, hidden)), _states(x, h)
        state = torch.empty_like(drive)  # what the states are turned into
        rz, n = x.new_empty(*drive.shape[:2], 2 * hidden), x.new_empty(len(x), *h.shape)
        turn = _Turn(_doubled(theirs, hidden).t().contiguous(), len(h))
        bias, minus = _doubled(bias_h, hidden), x.new_tensor(-1.0)
        steps = zip(
            drive[..., : 2 * hidden].unbind(),
            drive[..., 2 * hidden :].unbind(),
            turn.steps(hs[:-1]),
            hs[:-1].unbind(),
            hs[1:].unbind(),
            turn.steps(state),
            state[..., : 2 * hidden].unbind(),
            state[..., 2 * hidden :].unbind(),
            rz.unbind(),
            rz[..., :hidden].unbind(),
            rz[..., hidden:].unbind(),
            n.unbind(),
            strict=True,
        )
        for drive_rz, drive_n, rows, before, after, turned, turned_rz, turned_n, rz_t, r, z, n_t in steps:
            turn.add(bias, rows, turned)
            torch.add(drive_rz, turned_rz, out=rz_t)
            sigmoid_(rz_t)
            torch.addcmul(drive_n, r, turned_n, out=n_t)
            sigmoid_(n_t)
            torch.add(minus, n_t, alpha=2, out=n_t)
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
        torch.mul(slopes[:, :, 2], state[..., 2 * hidden :], out=slopes[:, :, 0])  # doubled
        slopes[:, :, 0].mul_(torch.add(x.new_tensor(0.5), r, alpha=-0.5))
        torch.sub(hs[:-1], n, out=slopes[:, :, 1]).mul_(z)
        slopes[:, :, 1].addcmul_(slopes[:, :, 1], z, value=-1)
        d = torch.empty_like(slopes)
        flat = d.flatten(2)
        turn = _Turn(theirs, records)
        steps = zip(
            slopes.unbind(),
            z.unbind(),
            d.unbind(),
            turn.steps(flat),
            dhs.unbind(),
            turn.steps(dhs),
            strict=True,
        )
        rest: tuple[Tensor, Tensor, Tensor] | None = None
        for slope, z_t, d_t, flat_t, dh, turned in reversed(list(steps)):
            if rest is not None:
                dh.addcmul_(rest[0], rest[1])
                turn.add(turned, rest[2], turned)
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


class RNN(torch.autograd.Function):
    """One direction of one layer (Elman 1990); tanh or rectified."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, h: Tensor, weights: Weights, keep: Keep, tanh: bool
    ) -> tuple[Tensor]:
        ours, theirs, bias_x, bias_h = weights
        drive, hs = rows_product(x, ours, bias_x + bias_h), _states(x, h)
        turn = _Turn(theirs.t().contiguous(), len(h))
        steps = zip(*map(turn.steps, (drive, hs[:-1], hs[1:])), strict=True)
        for drive_t, before, after in steps:
            turn.add(drive_t, before, after)
            after.tanh_() if tanh else after.relu_()
        ctx.save_for_backward(x, hs, ours, theirs)
        ctx.keep, ctx.tanh = keep, tanh
        return (hs[1:],)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, hs, ours, theirs = ctx.saved_tensors
        dhs, after = gradients[0].clone(memory_format=torch.contiguous_format), hs[1:]
        slopes = after.square().neg_().add_(1.0) if ctx.tanh else (after > 0).to(after.dtype)
        d, turn = torch.empty_like(slopes), _Turn(theirs, hs.shape[1])
        last: Tensor | None = None
        steps = zip(*map(turn.steps, (dhs, slopes, d)), strict=True)
        for dh, slope, d_t in reversed(list(steps)):
            if last is not None:
                turn.add(dh, last, dh)
            torch.mul(dh, slope, out=d_t)
            last = d_t
        ctx.keep(x.transpose(0, 1), hs[:-1].transpose(0, 1), d.transpose(0, 1).contiguous(), None)
        dx = rows_product(d, ours.t()) if ctx.needs_input_grad[1] else None
        first = rows_product(d[0], theirs.t()) if ctx.needs_input_grad[2] else None
        return None, dx, first, None, None, None
