"""Randomness that protects patients: AES-256-CTR key streams, keyed by the operating system.

torch's CPU generator keeps 32 bits of its seed, so its noise can be found by trying all of them; here
the key has 256 bits and never leaves the process. `Seeded` exists for simulations and tests.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_ZERO_BLOCK = bytes(16)
_PIECE_BYTES = 8 << 20


class Stream:
    """One AES-256-CTR key stream. Use a key for one stream only.

    Args:
        key: 32 secret bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(_ZERO_BLOCK)).encryptor()

    def __repr__(self) -> str:
        return "Stream(key=…)"

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes of the key stream."""
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
        return self.uniform(count) < probability

    def permutation(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """A uniformly random order of 0 … count-1 (ties of 64-bit keys are negligible)."""
        return np.argsort(self.words(count), kind="stable")

    def normal(self, count: int) -> torch.Tensor:
        """`count` standard normals, float32 [count].

        Box & Muller (1958) in float64 from 53-bit uniforms, so that tails reach 8.5 standard
        deviations; rounded to float32 at the end.
        """
        pieces = []
        per_piece = _PIECE_BYTES // 8
        for start in range(0, count, per_piece):
            pieces.append(self._normal_piece(min(per_piece, count - start)))
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _normal_piece(self, count: int) -> torch.Tensor:
        half = (count + 1) // 2
        words = torch.frombuffer(bytearray(self.bytes(16 * half)), dtype=torch.int64)
        bits = words.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1).double()
        radius = bits[:half].add_(1.0).mul_(2.0**-53).log_().mul_(-2.0).sqrt_()  # uniforms on (0, 1]
        angle = bits[half:].mul_(2.0 * math.pi * 2.0**-53)
        normals = torch.empty(2 * half)
        normals[:half] = radius * angle.cos()
        normals[half:] = radius * angle.sin()
        return normals[:count]


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
        return hmac.new(f"fedward simulation {self.seed}".encode(), message, hashlib.sha256).digest()
