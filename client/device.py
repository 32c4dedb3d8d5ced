"""Where a site computes, and in how much memory. Noise is always drawn on the processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from common.errors import SiteError

Device = Literal["auto", "cpu", "cuda"]
STEP_MEMORY = 1 << 30  # bytes


@dataclass(frozen=True)
class Computing:
    """How a site computes.

    Attributes:
        device: `auto` is CUDA where there is one.
        step_memory: bytes that activations and gradients of a step may take up, as far as one record allows.
    """

    device: Device = "cpu"
    step_memory: int = STEP_MEMORY


DEFAULT = Computing()


def resolve(wanted: Device) -> torch.device:
    """The device: `auto` is CUDA where there is one. On CUDA, from here on, this process multiplies whole
    float32 numbers: cuDNN's convolutions else round them to 11 bits (TF32), and where a patient's products
    cancel, its clipped gradient could come out 6 % too long.

    Raises:
        SiteError: if CUDA is asked for, and there is none.
    """
    present = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise SiteError(
            'device = "cuda": this machine has no CUDA device that torch can use',
            remedy='install a build of torch with CUDA and its driver, or say device = "cpu"',
        )
    if present:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if present else "cpu")
