"""Public data: never accepted unverified, prepared the same every time, fit for the ready studies."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest
from malformed import fingerprint

from client.cohort import load_cohort
from client.settings import SiteFolder
from common.errors import DatasetError, StudyError
from common.features import feature_names
from common.models import study_model
from common.study import Study, load_study
from simulations.datasets import datasets, fetch, prepare, registry
from simulations.datasets.heart_disease import CENTRES, PUBLISHED_COUNTS
from simulations.datasets.registry import Dataset, RemoteFile
from simulations.studies import ready_studies, ready_study

KEY = b"a key of thirty-two random bytes"
CONTENT = bytes(range(256)) * 4000
GOOD = RemoteFile("file.bin", "", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@dataclasses.dataclass
class Publisher:
    """A web server on loopback. It can forget Range, stop half-way, or serve something else."""

    url: str
    content: bytes = CONTENT
    ranges: bool = True
    stop_after: int | None = None
    status: int = 200
    asked: list[str | None] = dataclasses.field(default_factory=list)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    state = Publisher("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            start = int(re.findall(r"\d+", asked)[0]) if asked and state.ranges else 0
            body = state.content[start:]
            self.send_response(206 if start else state.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if state.stop_after is None else body[: state.stop_after])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def published(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    """The publisher of a data set called `example`."""
    file = dataclasses.replace(GOOD, url=publisher.url)
    example = Dataset("example", "An example", "example", (file,), "nobody", "CC0")
    monkeypatch.setattr(registry, "_DATASETS", (*datasets(), example))
    return publisher


def test_a_download_is_verified_and_kept(published: Publisher, tmp_path: Path) -> None:
    seen: list[int] = []
    folder = fetch("example", tmp_path, progress=lambda name, have, size: seen.append(have))
    assert (folder / "file.bin").read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == ["file.bin"]
    assert seen[-1] == len(CONTENT)
    fetch("example", tmp_path)
    assert len(published.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_resumed(published: Publisher, tmp_path: Path, ranges: bool) -> None:
    published.stop_after = 300_000
    with pytest.raises(DatasetError, match=r"file\.bin"):
        fetch("example", tmp_path)
    assert [p.name for p in (tmp_path / "example").iterdir()] == ["file.bin.part"]
    published.stop_after, published.ranges = None, ranges
    folder = fetch("example", tmp_path)
    assert published.asked == [None, "bytes=300000-"]
    assert (folder / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT + b"more", b"x" * (len(CONTENT) * 3)])
def test_wrong_content_is_named_and_leaves_nothing(
    published: Publisher, tmp_path: Path, content: bytes
) -> None:
    published.content = content
    with pytest.raises(
        DatasetError, match=rf"file\.bin: .* has SHA-256 [0-9a-f]{{64}}, expected {GOOD.sha256}"
    ):
        fetch("example", tmp_path)
    assert list((tmp_path / "example").iterdir()) == []


def test_a_refusal_of_the_publisher_is_named(published: Publisher, tmp_path: Path) -> None:
    published.status = 404
    with pytest.raises(DatasetError, match=r"file\.bin: cannot be downloaded .*\(Not Found\)") as caught:
        fetch("example", tmp_path)
    assert "--mirror" in caught.value.remedy


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = dataclasses.replace(GOOD, url="http://127.0.0.1:9/file.bin")
    monkeypatch.setattr(registry, "_DATASETS", (Dataset("example", "", "example", (file,), "", ""),))
    with pytest.raises(DatasetError, match=r"file\.bin"):
        fetch("example", tmp_path)


def test_a_mirror_is_verified_too(published: Publisher, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror" / "example"
    mirror.mkdir(parents=True)
    (mirror / "file.bin").write_bytes(CONTENT)
    for given in (mirror, mirror.parent):
        folder = fetch("example", tmp_path / given.name / "out", mirror=given)
        assert (folder / "file.bin").read_bytes() == CONTENT
    (mirror / "file.bin").write_bytes(CONTENT[:-1])
    before = fingerprint(mirror)
    with pytest.raises(DatasetError, match="expected"):
        fetch("example", tmp_path / "third", mirror=mirror)
    assert list((tmp_path / "third" / "example").iterdir()) == []
    assert fingerprint(mirror) == before
    assert published.asked == []


def test_a_damaged_copy_is_replaced(published: Publisher, tmp_path: Path) -> None:
    folder = fetch("example", tmp_path)
    (folder / "file.bin").write_bytes(b"damaged")
    fetch("example", tmp_path)
    assert (folder / "file.bin").read_bytes() == CONTENT


def test_absent_mirrors_folders_and_names(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"processed\.cleveland\.data: is not in the mirror"):
        fetch("heart-disease", tmp_path / "out", mirror=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be made"):
        fetch("heart-disease", tmp_path / "file")
    with pytest.raises(DatasetError, match="choose one of breast-cancer"):
        fetch("no-such", tmp_path)
    with pytest.raises(DatasetError, match="fetch the data set first"):
        prepare("heart-disease", tmp_path / "nowhere", tmp_path / "sites")
    with pytest.raises(DatasetError, match="cannot be written"):
        prepare("breast-cancer", tmp_path, tmp_path / "file")


def test_every_file_has_an_address_and_a_digest() -> None:
    for dataset in datasets():
        assert dataset.citation
        assert dataset.licence
        for file in dataset.files:
            assert file.url.startswith("https://")
            assert re.fullmatch("[0-9a-f]{64}", file.sha256)


@pytest.fixture(scope="session")
def hearts(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch("heart-disease", tmp_path_factory.mktemp("raw"), mirror=mirror)


def cohorts(name: str, study: Study, raw: Path, sites: Path) -> dict[str, tuple[int, int]]:
    """Patients who train and test per site, as `study` reads a prepared data set."""
    counts = {}
    for folder in prepare(name, raw, sites):
        assert {p.name for p in folder.iterdir()} == {"site.toml", "patients.csv", "SOURCE.txt"}
        cohort = load_cohort(SiteFolder(folder), study, KEY)
        assert cohort.train.features.shape[1] == len(feature_names(study))
        counts[folder.name] = (len(cohort.train), len(cohort.test))
    return counts


@pytest.mark.shared
@pytest.mark.parametrize("name", ["heart-disease", "heart-disease-flamby"])
def test_heart_disease_has_flambys_patients_and_split(name: str, hearts: Path, tmp_path: Path) -> None:
    study = load_study(ready_study(name))
    assert cohorts(name, study, hearts, tmp_path) == PUBLISHED_COUNTS
    sizes = [tomllib.loads((tmp_path / c / "site.toml").read_text())["site"]["public_size"] for c in CENTRES]
    assert sizes == [300, 260, 40, 130]


@pytest.mark.shared
def test_heart_disease_keeps_all_patients_and_columns(hearts: Path, tmp_path: Path) -> None:
    folders = prepare("heart-disease", hearts, tmp_path)
    tables = {f.name: pd.read_csv(f / "patients.csv", dtype=str) for f in folders}
    assert {c: len(t) for c, t in tables.items()} == {
        "cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200,
    }  # fmt: skip
    assert {"slope", "ca", "thal", "num", "split"} <= set(tables["va"].columns)
    assert all(t["patient_id"].is_unique for t in tables.values())


@pytest.mark.shared
def test_flambys_features_are_standardised_by_the_train_part(hearts: Path, tmp_path: Path) -> None:
    for folder in prepare("heart-disease-flamby", hearts, tmp_path):
        table = pd.read_csv(folder / "patients.csv")
        train = table[table["split"] == "train"].filter(regex="^x").to_numpy()
        assert train.shape[1] == 13
        np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-6)
        spread = train.std(axis=0, ddof=1)
        assert ((abs(spread - 1) < 1e-6) | (spread == 0)).all()
        study = load_study(ready_study("heart-disease-flamby"))
        cohort = load_cohort(SiteFolder(folder), study, KEY)
        # The interval [-1, 1] leaves FLamby's features as they are.
        np.testing.assert_allclose(
            np.sort(cohort.train.features.numpy(), axis=0), np.sort(train, axis=0), rtol=1e-5, atol=1e-5
        )


def test_breast_cancer_is_four_unequal_hospitals(tmp_path: Path) -> None:
    study = load_study(ready_study("breast-cancer"))
    counts = cohorts("breast-cancer", study, fetch("breast-cancer", tmp_path / "raw"), tmp_path / "sites")
    assert [sum(c) for c in counts.values()] == [227, 171, 114, 57]
    ids = [i for f in counts for i in pd.read_csv(tmp_path / "sites" / f / "patients.csv")["patient_id"]]
    assert sorted(ids) == [f"wdbc-{i:04d}" for i in range(1, 570)]


def test_digits_fit_the_network_of_their_study(tmp_path: Path) -> None:
    study = load_study(ready_study("digits-mlp"))
    counts = cohorts("digits", study, fetch("digits", tmp_path / "raw"), tmp_path / "sites")
    assert [sum(c) for c in counts.values()] == [450, 449, 449, 449]
    assert len(feature_names(study)) == 784
    table = pd.read_csv(tmp_path / "sites" / "ashford" / "patients.csv")
    image = table.filter(regex="^pixel").to_numpy()[0].reshape(28, 28)
    assert image[10:18, 10:18].sum() == image.sum() > 0


def test_preparing_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    content = []
    for name in ("first", "second"):
        folders = prepare("breast-cancer", tmp_path, tmp_path / name)
        content.append([(p.name, p.read_bytes()) for f in folders for p in sorted(f.iterdir())])
    assert content[0] == content[1]


def test_preparing_again_leaves_keys_and_ledger_alone(tmp_path: Path) -> None:
    folder = prepare("breast-cancer", tmp_path, tmp_path / "sites")[0]
    (folder / "keys").mkdir()
    (folder / "keys" / "split.key").write_bytes(KEY)
    prepare("breast-cancer", tmp_path, tmp_path / "sites")
    assert (folder / "keys" / "split.key").read_bytes() == KEY


@pytest.mark.parametrize("name", ready_studies())
def test_every_ready_study_is_sound_and_its_model_can_be_built(name: str) -> None:
    study = load_study(ready_study(name))
    assert study.name == name
    study_model(study)


def test_unknown_ready_studies_are_named() -> None:
    with pytest.raises(StudyError, match="choose one of"):
        ready_study("no-such")
