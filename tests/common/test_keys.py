"""Ed25519 identities: they sign what others can check, and are never shown, shared or made twice."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import keys
from common.errors import SiteError
from common.keys import PublicKey, SigningKey, make_signing_key, read_public_key, read_signing_key

# RFC 8032, section 7.1, tests 1 to 3: secret, public, message, signature.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("secret", "public", "message", "signature"), VECTORS)
def test_signatures_are_those_of_the_standard(secret: str, public: str, message: str, signature: str) -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)))
    assert key.public.raw.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    assert PublicKey(bytes.fromhex(public)).verifies(bytes.fromhex(signature), bytes.fromhex(message))


def test_anything_else_does_not_verify() -> None:
    key, other = SigningKey(Ed25519PrivateKey.generate()), SigningKey(Ed25519PrivateKey.generate())
    signature = key.sign(b"content")
    assert key.public.verifies(signature, b"content")
    assert not other.public.verifies(signature, b"content")
    assert not key.public.verifies(signature, b"contenu")
    assert not key.public.verifies(signature, b"")
    for position in range(64):
        changed = bytearray(signature)
        changed[position] ^= 1
        assert not key.public.verifies(bytes(changed), b"content")
    for length in (0, 32, 63, 65, 128):
        assert not key.public.verifies((signature * 2)[:length], b"content")


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_public_key_has_32_bytes(length: int) -> None:
    with pytest.raises(ValueError, match="32"):
        PublicKey(bytes(length))


def test_public_keys_are_equal_by_their_bytes() -> None:
    key = SigningKey(Ed25519PrivateKey.generate())
    same, other = PublicKey(key.public.raw), SigningKey(Ed25519PrivateKey.generate()).public
    assert key.public == same
    assert hash(key.public) == hash(same)
    assert key.public != other
    assert key.public != key.public.raw
    assert len({key.public, same, other}) == 2
    assert len(same.fingerprint) == 64
    assert same.fingerprint != other.fingerprint


# --- kept


def test_a_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "site.key"
    made = make_signing_key(path)
    content = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.with_suffix(".pub").stat().st_mode) == 0o644
    for _ in range(2):
        assert make_signing_key(path).public == made.public
    assert path.read_bytes() == content
    assert read_signing_key(path).public == made.public == read_public_key(path.with_suffix(".pub"))
    assert made.public != make_signing_key(tmp_path / "other.key").public


def test_the_umask_opens_nothing(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_signing_key(tmp_path / "keys" / "site.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys" / "site.key").stat().st_mode) == 0o600


def test_openssl_reads_them(tmp_path: Path) -> None:
    """An auditor needs nothing of ours to check a signature."""
    key = make_signing_key(tmp_path / "site.key")
    (tmp_path / "content").write_bytes(b"a ledger's hash")
    (tmp_path / "signature").write_bytes(key.sign(b"a ledger's hash"))
    line = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "site.pub", "-rawin", "-in", "content"]
    try:
        done = subprocess.run(
            [*line, "-sigfile", "signature"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert done.returncode == 0, done.stderr
    assert "Verified Successfully" in done.stdout


def test_whoever_comes_second_gets_the_first_ones_key(tmp_path: Path) -> None:
    """Two commands at the same time: a key that was told must not be replaced."""
    path, found = tmp_path / "site.key", list[SigningKey | SiteError]()
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait(30)
        try:
            found.append(make_signing_key(path))
        except SiteError as error:  # read while the first one was writing it
            found.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    made = {key.public for key in found if isinstance(key, SigningKey)}
    assert len(found) == 8
    assert made == {read_signing_key(path).public}


def test_a_public_key_that_a_crash_left_out_is_made_good(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    made = make_signing_key(path)
    path.with_suffix(".pub").unlink()
    assert make_signing_key(path).public == made.public
    assert read_public_key(path.with_suffix(".pub")) == made.public


def test_a_crash_leaves_no_half_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    def die(*_: object) -> None:
        raise Crash

    path = tmp_path / "site.key"
    with monkeypatch.context() as patched:
        patched.setattr(keys.os, "fsync", die)
        with pytest.raises(Crash):
            make_signing_key(path)
    made = make_signing_key(path)
    assert read_signing_key(path).public == made.public == read_public_key(path.with_suffix(".pub"))


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    native = Ed25519PrivateKey.generate()
    key = SigningKey(native)
    secret = native.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    for text in (repr(key), str(key), f"{key}", repr([key])):
        assert secret.hex() not in text
        assert key.public.fingerprint[:12] in text
    with pytest.raises(TypeError):
        pickle.dumps(key)


# --- wrong


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o777])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "site.key"
    make_signing_key(path)
    path.chmod(mode)
    with pytest.raises(SiteError, match="others may read") as error:
        read_signing_key(path)
    assert error.value.remedy == f"chmod 600 {path}"
    with pytest.raises(SiteError):
        make_signing_key(path)
    path.chmod(0o600)
    read_signing_key(path)


def pem(native: object, password: bytes | None = None) -> bytes:
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return native.private_bytes(  # type: ignore[attr-defined, no-any-return]
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how
    )


def public_pem(native: object) -> bytes:
    return native.public_key().public_bytes(  # type: ignore[attr-defined, no-any-return]
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


ED = Ed25519PrivateKey.generate()
OTHERS = {
    "nothing": b"",
    "noise": b"\xff\x00" * 40,
    "words": b"not a key",
    "cut": pem(ED)[:-20],
    "a certificate's head": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "an elliptic curve": pem(ec.generate_private_key(ec.SECP256R1())),
    "an odd curve": pem(ec.generate_private_key(ec.SECP256K1())),
    "RSA": pem(rsa.generate_private_key(65537, 2048)),
    "an exchange key": pem(x25519.X25519PrivateKey.generate()),
    "locked": pem(ED, b"password"),
    "its public half": public_pem(ED),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_secret_key_of_ours_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "site.key"
    path.write_bytes(OTHERS[kind])
    path.chmod(0o600)
    with pytest.raises(SiteError, match="not an Ed25519 key") as error:
        read_signing_key(path)
    assert str(path) in error.value.message
    with pytest.raises(SiteError):
        make_signing_key(path)
    assert path.read_bytes() == OTHERS[kind]


@pytest.mark.parametrize("kind", [*OTHERS, "the secret itself"])
def test_what_is_no_public_key_of_ours_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "site.pub"
    path.write_bytes({**OTHERS, "its public half": public_pem(ec.generate_private_key(ec.SECP256R1())),
                      "the secret itself": pem(ED)}[kind])  # fmt: skip
    with pytest.raises(SiteError, match="not an Ed25519 public key"):
        read_public_key(path)
    path.write_bytes(public_pem(ED))
    assert read_public_key(path).raw == SigningKey(ED).public.raw


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="no such file") as error:
        read_signing_key(tmp_path / "site.key")
    assert "fedward-site init" in error.value.remedy
    with pytest.raises(SiteError):
        read_public_key(tmp_path / "site.pub")
    (tmp_path / "folder").mkdir()
    for read in (read_signing_key, read_public_key):
        with pytest.raises(SiteError):
            read(tmp_path / "folder")
    (tmp_path / "large").write_bytes(b"x" * 5000)
    with pytest.raises(SiteError, match="more than"):
        read_public_key(tmp_path / "large")
