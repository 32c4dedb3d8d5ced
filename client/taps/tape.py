"""What layers leave during one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from client.taps.parts import Part
from common.errors import StudyError

_REMEDY = "give the layer the batch in its first dimension, and leave its input as it is"


class Tape:
    """The parts of one pass.

    Attributes:
        records: that the pass has.
        parts: what has been tapped so far; the backward pass adds them.
    """

    def __init__(self) -> None:
        self.records = 0
        self.parts: list[Part] = []
        self._anchor = torch.zeros((), requires_grad=True)

    def begin(self, records: int) -> None:
        self.records, self.parts = records, []

    def tap(
        self,
        name: str,
        x: torch.Tensor,
        compute: Callable[[], torch.Tensor],
        keep: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        """compute(), of which the backward pass hands the loss's gradient to `keep`.

        Args:
            name: of the layer, for messages.
            x: the layer's input [records, …]; `compute` uses no weight that needs a gradient.

        Raises:
            StudyError: if x's first dimension isn't the records'; in the backward pass if x was changed.
        """
        if not torch.is_grad_enabled():
            return compute()
        self.check(name, x)
        version = x._version

        def done(gradient: torch.Tensor) -> None:
            refuse_changed(name, x, version)
            keep(gradient)

        output = compute()
        if output.requires_grad and not output._is_view():
            output.register_hook(done)
            return output
        # What changes a view in place takes its hooks out of the graph; a function stays. It also stands
        # where no input needs a gradient.
        result: torch.Tensor = _Passed.apply(self._anchor, output, done)
        return result

    def check(self, name: str, x: torch.Tensor) -> None:
        """Refuse an input that isn't [records, …]."""
        if x.dim() == 0 or x.shape[0] != self.records:
            raise StudyError(f"layer {name}: its input isn't one of the batch's records", remedy=_REMEDY)

    @property
    def anchor(self) -> torch.Tensor:
        """A leaf that makes what is computed from it need a gradient."""
        return self._anchor


def refuse_changed(name: str, x: torch.Tensor, version: int) -> None:
    """Refuse an input that was changed since it had this version."""
    if x._version != version:
        raise StudyError(f"layer {name}: its input was changed in place", remedy=_REMEDY)


class _Passed(torch.autograd.Function):
    """The same tensor; its gradient is handed over on the way back."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, output: torch.Tensor, done: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.done = done
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        ctx.done(gradients[0])
        return None, gradients[0] if ctx.needs_input_grad[1] else None, None
