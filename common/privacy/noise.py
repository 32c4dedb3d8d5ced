"""Randomness that protects patients: AES-256-CTR key streams, keyed by the operating system.

torch's CPU generator keeps 32 bits of its seed, so its noise can be found by trying all of them; here
the key has 256 bits and never leaves the process. `Seeded` exists for simulations and tests.

Numbers with noise leave through `noised` alone: as integers times a public step of a grid. Floating-point
noise as such has gaps, and the low bits of sum + noise tell which sums are possible (Mironov 2012, "On
significance of the least significant bits for differential privacy"; Jin, McMurtry, Rubinstein, Ohrimenko
2022, "Are we there yet? Timing and floating-point attacks on differential privacy systems"; for pairs of
normals Holohan, Braghin 2021, "Secure random sampling in differential privacy"). On a grid much coarser
than those gaps, the probability of each integer is that of the real Gaussian mechanism, rounded, up to a
factor that `noised` states; so what is proven for real numbers carries over.
"""

from __future__ import annotations

import hmac
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

Floats = npt.NDArray[np.float64]

GRID_BITS = 16
"""A grid's step is the largest power of two that is at most the noise's standard deviation / 2^16."""

# Parts of one key's counter space that cannot meet: 2^126 blocks lie between them.
_BYTES, _NORMALS, _TAILS = (bytes([first, *bytes(15)]) for first in (0x00, 0x40, 0x80))


class Stream:
    """One AES-256-CTR key stream, and an independent one of normals. Use a key for one stream only.

    What it gives depends on the key and on how much was taken before, not on the sizes of the takings;
    normals and bytes don't use up each other.

    Args:
        key: 32 secret bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = algorithms.AES(key)
        self._encryptor: CipherContext | None = None  # made when first asked: many streams never are
        self._normals: _Normals | None = None

    def __repr__(self) -> str:
        return "Stream(key=…)"

    def _counting_from(self, block: bytes) -> CipherContext:
        return Cipher(self._cipher, modes.CTR(block)).encryptor()

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes of the key stream."""
        if self._encryptor is None:
            self._encryptor = self._counting_from(_BYTES)
        return self._encryptor.update(bytes(count))

    def words(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """`count` uniform 64-bit words."""
        return np.frombuffer(self.bytes(8 * count), dtype=np.uint64)

    def uniform(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """`count` float64 values, uniform on the multiples of 2^-53 in [0, 1)."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def bernoulli(self, count: int, probability: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """`count` independent coins; each is true with `probability`, to within 2^-53."""
        if probability >= 1:
            return np.ones(count, dtype=np.bool_)
        # As `uniform(count) < probability`, of the words themselves
        below = math.ceil(max(0.0, probability) * 2.0**53) << 11
        return self.words(count) < np.uint64(below)

    def permutation(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """A uniformly random order of 0 … count-1 (ties of 64-bit keys are negligible)."""
        return self.words(count).argsort(kind="stable")

    def normals(self, count: int, scale: float = 1.0) -> Iterator[Floats]:
        """`count` standard normals, times `scale`, in consecutive pieces, float64: each may be overwritten by
        the caller, and is by the next one. Not to be released as they are: see `noised`.
        """
        if self._normals is None:
            tails = partial(self._counting_from, _TAILS)
            self._normals = _Normals(self._counting_from(_NORMALS), tails)
        for piece in self._normals.take(count):
            if scale != 1.0:
                piece *= scale
            yield piece

    def normal(self, count: int) -> torch.Tensor:
        """`count` standard normals, float64 [count]; see `normals`."""
        drawn = np.empty(count)
        self.fill(drawn)
        return torch.from_numpy(drawn)

    def fill(self, drawn: Floats, scale: float = 1.0) -> None:
        """Overwrite `drawn` [count] with standard normals times `scale`; see `normals`."""
        start = 0
        for piece in self.normals(len(drawn)):
            np.multiply(piece, scale, out=drawn[start : start + len(piece)])
            start += len(piece)


class Normals(Protocol):
    """What gives standard normals: a `Stream`, or what draws ahead of one (client/ahead)."""

    def normals(self, count: int, scale: float = 1.0) -> Iterator[Floats]:
        """As `Stream.normals`."""


# --- the sampler

_FIRST_PAIRS, _MOST_PAIRS = 512, 32_768  # of a block: large enough that numpy's calls cost little
_PART = 16_384  # pairs computed at a time
_PAIR_BYTES = 14  # a radius of 8, a position in an arc of 4, an arc of 2
_TAIL = 2.0**-24
_ARC_BITS = 14
_ARC = 2.0 * math.pi / 2**_ARC_BITS
_SCALE = 3.0 ** (-1.0 / 3.0)  # the α of `_Normals`
_QUARTER = np.exp(1j * _ARC * np.arange(2**_ARC_BITS // 4)) / _SCALE
_ARCS = np.concatenate([_QUARTER, 1j * _QUARTER, -_QUARTER, -1j * _QUARTER])


class _Room:
    """Scratch for one block of pairs. Kept, because fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self.zeros = memoryview(bytes(_PAIR_BYTES * _MOST_PAIRS))
        self.stream = bytearray(_PAIR_BYTES * _MOST_PAIRS + 15)  # the cipher asks for 15 bytes more
        self.square, self.t = np.empty(_PART), np.empty(_PART)
        self.turn = np.empty(_PART, dtype=np.complex128)


_ROOMS: list[_Room] = []  # as many as threads have drawn at a time; append and pop are atomic


class _Normals:
    """Standard normals from a key stream, block by block: 2^10, 2^11, … 2^16, 2^16, … numbers.

    Box & Muller (1958): r exp(iθ) with r² = -2 ln u is a pair of independent standard normals. u has 64
    bits, and 128 below 2^-24, so that r reaches 13.3; θ has 46 bits, of which 14 choose one of 16,384 arcs.
    From an arc's middle it is |θ'| ≤ 2^-14 π away, where exp(iθ') = cos θ' (1 + i tan θ') is had from the
    first terms of two series: cos²θ' = 1 - θ'² and tan θ' = θ' (1 + θ'²/3) to a relative 5e-16 and 2e-16.
    It is computed from αθ' with α³ = 1/3, as α² cos²θ' and αθ' ((αθ')² + 3α²) = tan θ', in fewer passes.
    """

    def __init__(self, stream: CipherContext, tails: Callable[[], CipherContext]) -> None:
        self._stream, self._tails = stream, tails
        self._more: CipherContext | None = None  # few streams come to need it
        self._pairs = _FIRST_PAIRS
        self._block = np.empty(0, dtype=np.complex128)
        self._waiting: Floats = np.empty(0)

    def take(self, count: int) -> Iterator[Floats]:
        while count > 0:
            if not len(self._waiting):
                self._waiting = self._next()
            piece, self._waiting = self._waiting[:count], self._waiting[count:]
            count -= len(piece)
            yield piece

    def _next(self) -> Floats:
        pairs, self._pairs = self._pairs, min(2 * self._pairs, _MOST_PAIRS)
        try:
            room = _ROOMS.pop()
        except IndexError:
            room = _Room()
        self._stream.update_into(room.zeros[: _PAIR_BYTES * pairs], room.stream)
        radius = np.frombuffer(room.stream, np.int64, pairs)
        position = np.frombuffer(room.stream, np.int32, pairs, 8 * pairs)
        arc = np.frombuffer(room.stream, np.uint16, pairs, 12 * pairs)
        if len(self._block) < pairs:
            self._block = np.empty(pairs, dtype=np.complex128)
        for start in range(0, pairs, _PART):  # what a core's cache holds
            part = slice(start, min(start + _PART, pairs))
            self._box_muller(radius[part], position[part], arc[part], room, self._block[part])
        _ROOMS.append(room)
        return self._block[:pairs].view(np.float64)

    def _box_muller(
        self,
        radius: npt.NDArray[np.int64],
        position: npt.NDArray[np.int32],
        arc: npt.NDArray[np.uint16],
        room: _Room,
        pair: npt.NDArray[np.complex128],
    ) -> None:
        """Write normals as complex numbers [pairs] from uniform words [pairs]; `radius` is overwritten."""
        pairs = len(radius)
        square, t, turn = room.square[:pairs], room.t[:pairs], room.turn[:pairs]
        np.copyto(square, radius)
        square *= 2.0**-63
        square *= square  # u², because the sign says nothing
        if square.min() < _TAIL**2:
            for small in np.flatnonzero(square < _TAIL**2):
                square[small] = self._tail(int(radius[small])) ** 2
        np.log(square, out=square)  # -r²

        index, slope = radius, radius.view(np.float64)  # one after the other in the same memory
        np.copyto(index, arc)
        index &= 2**_ARC_BITS - 1
        np.take(_ARCS, index, out=turn, mode="wrap")  # none is out of range, but "raise" copies
        np.copyto(slope, position)
        slope *= _SCALE * _ARC * 2.0**-32
        np.multiply(slope, slope, out=t)
        t -= _SCALE**2
        square *= t  # α² r² cos²
        t += 4.0 * _SCALE**2
        slope *= t  # tan

        np.sqrt(square, out=pair.real)
        np.multiply(pair.real, slope, out=pair.imag)
        pair *= turn

    def _tail(self, word: int) -> float:
        """A uniform number below 2^-24, of 128 bits, from the signed word that was found to be small."""
        if self._more is None:
            self._more = self._tails()
        more = int.from_bytes(self._more.update(bytes(8)), "little")
        return ((word if word >= 0 else ~word) + (more + 0.5) * 2.0**-64) * 2.0**-63


# --- release


def grid_step(standard_deviation: float) -> float:
    """The public step of the grid on which numbers with this noise leave (see `GRID_BITS`)."""
    return math.ldexp(1.0, math.frexp(standard_deviation)[1] - 1 - GRID_BITS)


def noised(
    exact: torch.Tensor,
    standard_deviation: float,
    source: Normals,
    *,
    divisor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """n · (grid step / divisor) with the integer n = round((exact + noise) / grid step): may be seen.

    What is achieved. In exact arithmetic this is the Gaussian mechanism followed by rounding, which costs
    nothing, at the sensitivity that `exact` has *as computed* (bounding its rounding is the caller's work).
    What leaves is a function of n and of public numbers alone. The float64 sum is a fixed, monotone
    function of the real sum of `exact` and the drawn noise; so what remains is how far drawn noise is from
    real normals, seen through cells one step wide. Two of them share a radius r and an angle; a standard
    deviation has at most 2^17 steps:

    - computed pairs lie within 2^-50 r of the exact ones: 2^-31 steps for most;
    - neighbouring radii are at most 2^-30 steps apart for 2^-5 < r < 3.7, 2^-24 up to 5.8 (2^-24 of the
      pairs are beyond) and 2^-38 from there on;
    - angles are an even lattice, 2^-26 r steps apart: it errs by the square of that, except in the one
      cell of 2^26 that has a side along a ray;
    - so a cell's probability is off by a relative 2^-28 (root mean square), and the privacy loss of a
      million values by a sum of such terms with mean zero, of standard deviation 4e-6;
    - r ends at 13.3: 2^-128 of the pairs are missing, or 2e-33 of δ per million values.

    What is not. This is an analysis of the sampler, not a machine-checked proof. It takes AES-256 for a
    random function (as a permutation, it differs from one by 2^-91 per million values and key). Time
    depends on the noise where a tail is refined (one pair in 2^24, a few microseconds), and on whatever
    the processor makes of its operands. Memory that held noise is not erased.

    Args:
        exact: float32 or float64, any shape; below 2^34 standard deviations: beyond, the grid is coarser.
        standard_deviation: of the noise, between 1e-200 and 1e200.
        divisor: public.
        dtype: of the result, float32 or float64.

    Returns:
        The shape of `exact`.

    Raises:
        ValueError: if the standard deviation or the divisor isn't such a positive number.
    """
    if not (1e-200 < standard_deviation < 1e200 and 0 < divisor < math.inf):
        raise ValueError(
            f"noise of standard deviation {standard_deviation}, divided by {divisor}: give positive numbers"
        )
    # Between 2^52 and 2^53 steps, float64 has one number a step: there, adding rounds to the grid. Unlike
    # np.rint, it never leaves -0, which would tell on which side of 0 the unrounded sum was.
    magic = 1.5 * 2.0**52 * grid_step(standard_deviation)
    values = exact.detach().double().numpy().reshape(-1)
    leaving = np.empty(len(values), dtype=np.float32 if dtype == torch.float32 else np.float64)
    scale = 1.0 / divisor
    start = 0
    for piece in source.normals(len(values), standard_deviation):
        end = start + len(piece)
        piece += values[start:end]
        piece += magic
        piece -= magic
        part = leaving[start:end]
        part[...] = piece
        np.multiply(part, scale, out=part)
        start = end
    found = torch.from_numpy(leaving)
    return found if exact.dim() == 1 else found.view(exact.shape)


# --- where streams come from


class Randomness(Protocol):
    """Where a vault's streams come from."""

    @property
    def protective(self) -> bool:
        """Whether nobody can predict the streams. A deployed vault demands it."""

    def stream(self, purpose: str, *context: str | int) -> Stream:
        """A stream for one purpose, independent of every other."""


class OperatingSystem:
    """A fresh key from the operating system's CSPRNG for each stream."""

    protective = True

    def stream(self, purpose: str, *context: str | int) -> Stream:
        return Stream(os.urandom(32))


class Seeded:
    """Reproducible streams: the key is HMAC-SHA256(seed, purpose and context). No protection at all."""

    protective = False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def stream(self, purpose: str, *context: str | int) -> Stream:
        return Stream(self.key(purpose, *context))

    def key(self, purpose: str, *context: str | int) -> bytes:
        """32 bytes that depend on the seed, the purpose and the context alone."""
        message = json.dumps([purpose, *context]).encode()
        return hmac.digest(f"fedward simulation {self.seed}".encode(), message, "sha256")
