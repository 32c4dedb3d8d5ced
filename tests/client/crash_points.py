"""Kills a vault at every call that changes the disk, in forked children; run by test_vault_crash.

    python crash_points.py BASE WORK ROUND KIND

BASE is a site folder, ROUND the round to ask. KIND is when the child dies: `before` or `after` the k-th
call, or `torn`, in the middle of the k-th write. Prints one JSON object for each k.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from client.ledger import spending
from client.settings import SiteFolder
from client.site import open_vault
from common.journal import read_journal
from common.messages import Job, JobHeader, Refusal, Reply, decode, encode
from common.models import parameter_arrays, study_model
from common.study import Study, parse_study

CALLS = ("write", "fsync", "replace", "unlink", "ftruncate", "fchmod")


def job(wanted: Study, number: int, session: str = "first", shift: float = 0.0) -> bytes:
    arrays = {n: a + a.dtype.type(shift) for n, a in parameter_arrays(study_model(wanted)).items()}
    return encode(Job(JobHeader(session=session, round=number, study=wanted.digest), arrays))


def die_at(fatal: int, kind: str, trail: Path) -> None:
    """From here on, calls are counted and noted; the `fatal`-th one is the last."""
    count = 0
    write = os.write
    note = os.open(trail, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watched(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            last = count == fatal
            if last and kind == "torn":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if last and kind != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **named)
            finally:
                write(note, f"{name}\n".encode())
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in ("write",) if kind == "torn" else CALLS:
        setattr(os, name, watched(name))


def child(root: Path, request: bytes, fatal: int, kind: str) -> None:
    folder = SiteFolder(root)
    vault = open_vault(folder)
    real = vault._holdings.cohort
    trail = root / "trail"

    def cohort(wanted: Study) -> Any:
        with trail.open("a") as file:
            file.write("cohort\n")
        return real(wanted)

    vault._holdings = type(vault._holdings)(**{**vars(vault._holdings), "cohort": cohort})
    die_at(fatal, kind, trail)
    reply = vault.answer(request)
    with (root / "reply").open("wb") as file:
        file.write(reply)


def outcome(root: Path, wanted: Study, number: int) -> dict[str, Any]:
    """What the world finds after the crash."""
    folder = SiteFolder(root)
    request = job(wanted, number)
    left = root / "reply"
    entries = read_journal(folder.ledger_path)
    reserved = any(e.kind == "reserve" and e.body["round"] == number for e in entries)
    told = {
        "reserved": reserved,
        "sequences": [e.sequence for e in entries],
        "spent_after_crash": getattr(spending(folder.ledger_path).get(wanted.digest), "epsilon", 0.0),
        "replied": left.exists(),
        "trail": (root / "trail").read_text().split() if (root / "trail").exists() else [],
    }
    vault = open_vault(folder)
    other = decode(vault.answer(job(wanted, number, shift=1.0))) if reserved else None
    first = vault.answer(request)
    vault.close()
    vault = open_vault(folder)
    told |= {
        "other_content": other.header.code if isinstance(other, Refusal) else None,
        "answers": isinstance(decode(first), Reply),
        "same_again": vault.answer(request) == first,
        "same_as_before": left.read_bytes() == first if left.exists() else None,
        "next_round": isinstance(decode(vault.answer(job(wanted, number + 1))), Reply),
        "second_session": decode(vault.answer(job(wanted, 1, "second"))).header.code,
    }
    vault.close()
    told["spent"] = spending(folder.ledger_path)[wanted.digest].epsilon
    told["entries"] = [(e.kind, e.body["round"]) for e in read_journal(folder.ledger_path)]
    told["leftovers"] = [p.name for p in folder.replies.iterdir() if p.name.startswith(".")]
    return told


def main() -> None:
    base, work, number, kind = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    wanted = parse_study(next((base / "approved").iterdir()).read_bytes(), "approved")
    for fatal in range(1, 100):
        root = work / f"{kind}-{number}-{fatal}"
        shutil.copytree(base, root)
        pid = os.fork()
        if pid == 0:
            try:
                child(root, job(wanted, number), fatal, kind)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"fatal": fatal, "killed": killed, **outcome(root, wanted, number)}), flush=True)
        shutil.rmtree(root)
        if not killed:
            return


if __name__ == "__main__":
    main()
