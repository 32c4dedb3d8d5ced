"""Kills a vault at every call that changes the disk, in forked children; run by test_vault_crash.

    python crash_points.py WORK [BASE ROUND KIND]…

BASE is a site folder, ROUND the round to ask. KIND is when the child dies: `before` or `after` the k-th
call, or `torn`, in the middle of the k-th write. With `full` it doesn't die: from the k-th call on, the
disk is full until the request has been answered; then it is asked once more. Prints one JSON object for
each k.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from client.account import read_account, spending
from client.ledger import check_certificates, check_head, read_head
from client.settings import SiteFolder
from client.site import open_vault
from common.journal import read_journal
from common.keys import read_public_key
from common.messages import Job, JobHeader, Refusal, Reply, decode, encode
from common.models import parameter_arrays, study_model
from common.study import Study, parse_study

CALLS = ("write", "fsync", "replace", "unlink", "ftruncate", "fchmod")
FAILING = ("write", "fsync", "replace", "fchmod")  # on a full disk; it can be cut and cleared all the same


def job(wanted: Study, number: int, session: str = "first", shift: float = 0.0) -> bytes:
    arrays = {n: a + a.dtype.type(shift) for n, a in parameter_arrays(study_model(wanted)).items()}
    header = JobHeader(session=session, round=number, study=wanted.digest)
    return encode(Job(header, arrays if number else {}))


def watch(fatal: int, kind: str, root: Path) -> dict[str, Any]:
    """From here on, calls are counted and noted; something happens at the `fatal`-th one.

    Returns:
        The calls as they were.
    """
    count = 0
    write = os.write
    note = os.open(root / "trail", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watched(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            last = count == fatal
            if kind == "full" and count >= fatal:
                (root / "reached").touch()
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(28, "No space left on device")
            if last and kind == "torn":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if last and kind in ("before", "torn"):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **named)
            finally:
                write(note, f"{name}\n".encode())
                if last and kind == "after":
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    names = {"torn": ("write",), "full": FAILING}.get(kind, CALLS)
    before = {name: getattr(os, name) for name in names}
    for name in names:
        setattr(os, name, watched(name))
    return before


def child(root: Path, request: bytes, fatal: int, kind: str) -> None:
    vault = open_vault(SiteFolder(root))
    real = vault._warm.holdings.records

    def records(wanted: Study) -> Any:
        with (root / "trail").open("a") as file:
            file.write("records\n")
        return real(wanted)

    vault._warm.holdings = type(vault._warm.holdings)(**{**vars(vault._warm.holdings), "records": records})
    before = watch(fatal, kind, root)
    reply = vault.answer(request)
    for name, call in before.items():
        setattr(os, name, call)
    (root / "reply").write_bytes(reply)
    if kind == "full":
        (root / "second").write_bytes(vault.answer(request))


def told_by(path: Path) -> bytes | None:
    """The reply that the world had before the crash; None if there was none, or it was a refusal."""
    content = path.read_bytes() if path.exists() else None
    return content if content and isinstance(decode(content), Reply) else None


def outcome(root: Path, wanted: Study, number: int) -> dict[str, Any]:
    """What the world finds after the crash."""
    folder = SiteFolder(root)
    request = job(wanted, number)
    left = [c for c in (told_by(root / "reply"), told_by(root / "second")) if c]
    entries = read_journal(folder.ledger_path)
    reserved = any(e.kind == "reserve" and e.body["round"] == number for e in entries)
    told = {
        "reserved": reserved,
        "sequences": [e.sequence for e in entries],
        "spent_after_crash": getattr(spending(folder.ledger_path).get(wanted.digest), "epsilon", 0.0),
        "replied": bool(left),
        "first": decode((root / "reply").read_bytes()).header.kind if (root / "reply").exists() else None,
        "second": decode((root / "second").read_bytes()).header.kind if (root / "second").exists() else None,
        "trail": (root / "trail").read_text().split() if (root / "trail").exists() else [],
    }
    verified(folder)
    vault = open_vault(folder)
    other = decode(vault.answer(job(wanted, number, shift=1.0))) if reserved and number else None
    first = vault.answer(request)
    vault.close()
    vault = open_vault(folder)
    told |= {
        "other_content": other.header.code if isinstance(other, Refusal) else None,
        "answers": isinstance(decode(first), Reply),
        "same_again": vault.answer(request) == first,
        "same_as_before": all(c == first for c in left),
        "next_round": number > wanted.algorithm.rounds
        or isinstance(decode(vault.answer(job(wanted, number + 1))), Reply),
        "second_session": decode(vault.answer(job(wanted, 1, "second"))).header.code,
    }
    vault.close()
    verified(folder)
    told["spent"] = spending(folder.ledger_path)[wanted.digest].epsilon
    told["entries"] = [
        (e.kind, e.body.get("round", e.body.get("digest"))) for e in read_journal(folder.ledger_path)
    ]
    hidden = [p for p in folder.state.rglob(".*") if p.is_file()]
    told["leftovers"] = [p.name for p in hidden if p.parent == folder.replies]
    return told


def verified(folder: SiteFolder) -> None:
    """As `fedward-site ledger verify` does."""
    account = read_account(folder.ledger_path, read_public_key(folder.signing_key_path.with_suffix(".pub")))
    check_head(folder.ledger_path, account, read_head(folder.ledger_path))
    check_certificates(folder.certificates, account)


def run(base: Path, work: Path, number: int, kind: str) -> None:
    """Every k, until the child comes through unharmed."""
    wanted = parse_study(next((base / "approved").iterdir()).read_bytes(), "approved")
    for fatal in range(1, 200):
        root = work / f"{kind}-{number}-{fatal}"
        shutil.copytree(base, root)
        pid = os.fork()
        if pid == 0:
            try:
                child(root, job(wanted, number), fatal, kind)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        reached = os.WIFSIGNALED(status) or (root / "reached").exists()
        told = {"round": number, "kind": kind, "fatal": fatal, "reached": reached}
        print(json.dumps({**told, **outcome(root, wanted, number)}), flush=True)
        shutil.rmtree(root)
        if not reached:
            return


def main() -> None:
    work, *words = sys.argv[1:]
    for base, number, kind in zip(words[::3], words[1::3], words[2::3], strict=True):
        run(Path(base), Path(work), int(number), kind)


if __name__ == "__main__":
    main()
