"""What passes a vault's socket: nothing planted in the data, nothing that tells how many they are."""

from __future__ import annotations

import base64
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small

from client.door import ask
from client.service import serve
from client.settings import SiteFolder
from client.site import open_vault
from common.messages import Job, JobHeader, Reply, decode, encode
from common.models import parameter_arrays, study_model
from common.study import Study

RARE = 0.7391857265  # a laboratory value that one patient has
NAMES = ("PATIENT-ZEBRA", "Aurelia-Quagga", "1949-02-17")
WANTED = small.study(
    statistics={"epsilon": 1.0, "delta": 1e-4, "bins": 4},
    data={
        "scaling": "moments",
        "columns": [
            {"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": small.WIDTH},
            {"kind": "categorical", "name": "gene", "codes": {"wt": "wild", "mut": "rare mutation"}},
        ],
    },
    evaluation={"every": 1, "bins": 10, "subgroups": ["gene"]},
)


class Wire:
    """A socket in front of a vault's: forwards every byte, and remembers it."""

    def __init__(self, vault: Path, path: Path) -> None:
        self.bytes = {"in": bytearray(), "out": bytearray()}
        self._vault, self._listener = vault, socket.socket(socket.AF_UNIX)
        self._sockets: list[socket.socket] = []
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._vault))
                self._sockets += [near, far]
                for source, target, way in ((near, far, "in"), (far, near, "out")):
                    thread = threading.Thread(target=self._pump, args=(source, target, way), daemon=True)
                    thread.start()
                    self._threads.append(thread)

    def _pump(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                self.bytes[way] += piece
                target.sendall(piece)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)
        for each in self._sockets:
            each.close()


def site_of(root: Path, count: int) -> SiteFolder:
    """`count` patients of one to three records, with names, a rare value and a rare code planted."""
    root.mkdir()
    (root / "site.toml").write_text('[site]\nname = "north"\npublic_size = 40\n[data]\nfile = "p.csv"\n')
    random = np.random.default_rng(count)
    header = ["patient_id", *(f"x_{i}" for i in range(small.WIDTH)), "gene", "y", "born", "name"]
    lines = [",".join(header)]
    for p in range(count):
        planted = p == 3
        for _ in range(1 + p % 3):
            x = random.uniform(-1, 1, small.WIDTH).round(6).tolist()
            x[0] = RARE if planted else x[0]
            who = NAMES[0] if planted else f"patient-{p}"
            gene = "mut" if planted else "wt"
            lines.append(",".join([who, *map(str, x), gene, str(p % 2), NAMES[2], NAMES[1]]))
    (root / "p.csv").write_text("\n".join(lines) + "\n")
    folder = SiteFolder(root)
    small.make_site_keys(folder)
    small.allow(folder, WANTED)
    return folder


def jobs(wanted: Study) -> Iterator[bytes]:
    """A whole session, a request for another study, and one of a lying coordinator."""
    parameters = parameter_arrays(study_model(wanted))
    scaling = {"mean": np.zeros(small.WIDTH), "deviation": np.ones(small.WIDTH)}
    for number in range(wanted.algorithm.rounds + 2):
        header = JobHeader(session="first", round=number, study=wanted.digest)
        yield encode(Job(header, parameters if number else {}, scaling if number else {}))
    yield encode(Job(JobHeader(session="other", round=1, study="0" * 64), parameters))
    exact = JobHeader(session="exact", round=1, study=wanted.digest, metrics="exact")
    yield encode(Job(exact, parameters, scaling))
    yield b"nonsense"


def session_of(folder: SiteFolder, wire_path: Path) -> tuple[list[bytes], Wire]:
    """Every answer of a session through a recorded socket."""
    vault = open_vault(folder)
    server = serve(vault, folder.socket_path)
    wire = Wire(folder.socket_path, wire_path)
    try:
        answers = [ask(str(wire_path), request, timeout=60) for request in jobs(WANTED)]
    finally:
        server.stop(grace=5).wait()
        wire.close()
        vault.close()
    return answers, wire


def traces() -> dict[str, bytes]:
    """The planted things in every spelling that software gives them."""
    words = {name: name.encode() for name in (*NAMES, "born", "rare mutation", "p.csv")}
    words |= {f"{name} in base64": base64.b64encode(name.encode())[:-4] for name in NAMES}
    words |= {f"{name} in hexadecimal": name.encode().hex().encode() for name in NAMES}
    for digits in (6, 8):
        words[f"{digits} digits of the rare value"] = f"{RARE:.{digits}f}"[:digits].encode()
    words["the rare value as float64"] = struct.pack("<d", RARE)
    words["the rare value as float32"] = struct.pack("<f", RARE)
    return words


def test_nothing_planted_passes_the_socket(tmp_path: Path) -> None:
    folder = site_of(tmp_path / "s", 53)
    answers, wire = session_of(folder, tmp_path / "wire.sock")
    assert [type(decode(a)).__name__ for a in answers] == ["Reply"] * 5 + ["Refusal"] * 3
    assert len(wire.bytes["out"]) > sum(map(len, answers))
    for name, trace in traces().items():
        assert trace not in wire.bytes["out"], name
    data = (tmp_path / "s" / "p.csv").read_bytes()  # the test would find them where they are
    assert all(name.encode() in data for name in NAMES)
    assert traces()["8 digits of the rare value"] in data


def test_the_recorded_bytes_are_those_that_passed(tmp_path: Path) -> None:
    folder = site_of(tmp_path / "s", 53)
    answers, wire = session_of(folder, tmp_path / "wire.sock")
    for answer in answers:
        assert answer[:200] in wire.bytes["out"]


def test_sizes_and_counts_do_not_depend_on_the_number_of_patients(tmp_path: Path) -> None:
    """Two sites of one declared size, with 53 and 117 patients."""
    lengths, headers = [], []
    for count in (53, 117):
        answers, _ = session_of(site_of(tmp_path / str(count), count), tmp_path / f"{count}.sock")
        lengths.append([len(a) for a in answers])
        found = [decode(a) for a in answers]
        changes = {"head": "0" * 64, "certificate": None}
        headers.append([m.header.model_copy(update=changes) for m in found if isinstance(m, Reply)])
    assert lengths[0] == lengths[1]
    assert headers[0] == headers[1]


@pytest.mark.parametrize("work", [0.3, 1.2, 2.0])
def test_the_time_of_an_answer_is_a_multiple_of_what_the_study_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: float
) -> None:
    """By a clock of the test's own: the vault sleeps for what is missing of the next second."""
    now, slept = [100.0], []
    folder = small.make_site(tmp_path / "s")
    wanted = small.study(privacy={**small.study().privacy.model_dump(), "reply_seconds": 1.0})
    small.allow(folder, wanted)
    vault = open_vault(folder)
    monkeypatch.setattr("client.vault.time.monotonic", lambda: now[0])
    monkeypatch.setattr("client.vault.time.sleep", slept.append)
    real = vault._work

    def slow(what: object) -> object:
        now[0] += work
        return real(what)  # type: ignore[arg-type]

    monkeypatch.setattr(vault, "_work", slow)
    header = JobHeader(session="first", round=1, study=wanted.digest)
    request = encode(Job(header, parameter_arrays(study_model(wanted))))
    assert isinstance(decode(vault.answer(request)), Reply)
    assert slept == [pytest.approx(np.ceil(work) - work, abs=1e-9)]
    vault.close()
