"""Ed25519 identities (RFC 8032): who signed a ledger entry or a certificate."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import SiteError
from common.files import read_bounded, write_atomic

_RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw


class PublicKey:
    """Checks signatures.

    Args:
        raw: 32 bytes.

    Raises:
        ValueError: if these bytes are no Ed25519 public key.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.native = Ed25519PublicKey.from_public_bytes(raw)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the raw key, 64 hexadecimal digits."""
        return hashlib.sha256(self.raw).hexdigest()

    def verifies(self, signature: bytes, content: bytes) -> bool:
        """Whether `signature` is this key's over `content`."""
        try:
            self.native.verify(signature, content)
        except InvalidSignature:
            return False
        return True

    def pem(self) -> bytes:
        return self.native.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)


class SigningKey:
    """A secret key; it never shows itself."""

    def __init__(self, native: Ed25519PrivateKey) -> None:
        self.native = native
        self.public = PublicKey(native.public_key().public_bytes(*_RAW))

    def __repr__(self) -> str:
        return f"SigningKey({self.public.fingerprint[:12]}…)"

    def sign(self, content: bytes) -> bytes:
        """The signature over `content`, 64 bytes."""
        return self.native.sign(content)


def make_signing_key(path: Path) -> SigningKey:
    """The key at `path` (PKCS #8 PEM, mode 0600), made from the operating system's randomness if absent;
    the public one lies beside it as `.pub`.

    Raises:
        SiteError: as `read_signing_key`.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    native = Ed25519PrivateKey.generate()
    content = native.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = path.with_suffix(".pub")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = read_signing_key(path)
        if not public.exists():  # a crash between the two
            write_atomic(public, key.public.pem(), mode=0o644)
        return key
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    key = SigningKey(native)
    write_atomic(public, key.public.pem(), mode=0o644)
    return key


def read_signing_key(path: Path) -> SigningKey:
    """Raises:
    SiteError: if it is absent, readable by others, or no Ed25519 key.
    """
    if not path.exists():
        raise SiteError(f"{path}: no such file", remedy="make the site's keys: fedward-site init, or join")
    content = read_bounded(path, SiteError, limit=4096)
    if path.stat().st_mode & 0o077:
        raise SiteError(f"{path}: others may read this secret", remedy=f"chmod 600 {path}")
    try:
        native = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        native = None
    if not isinstance(native, Ed25519PrivateKey):
        raise SiteError(f"{path}: not an Ed25519 key in PEM", remedy="restore the file from its copy")
    return SigningKey(native)


def read_public_key(path: Path) -> PublicKey:
    """Raises:
    SiteError: if it is absent or no Ed25519 public key.
    """
    content = read_bounded(path, SiteError, limit=4096)
    try:
        native = serialization.load_pem_public_key(content)
    except ValueError:
        native = None
    if not isinstance(native, Ed25519PublicKey):
        raise SiteError(f"{path}: not an Ed25519 public key in PEM", remedy="give the site's keys/site.pub")
    return PublicKey(native.public_bytes(*_RAW))
