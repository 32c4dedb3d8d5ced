"""Chest X-rays and adrenal glands: what their sites get, and that their studies run on it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from client.cohort import load_cohort
from client.settings import SiteFolder
from common.errors import DatasetError
from common.study import Study, load_study
from simulations.datasets import fetch, prepare
from simulations.datasets.adrenal import adrenal
from simulations.datasets.packing import packed, unpacked
from simulations.datasets.pneumonia import pneumonia
from simulations.datasets.registry import find
from simulations.datasets.sites import Hospital, write_sites
from simulations.engine import SimulationSettings, simulate
from simulations.studies import ready_study

KEY = b"a key of thirty-two random bytes"
SITES = ["ashford", "birchwood", "cedar-hill", "dunmore"]


@pytest.fixture(scope="session")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of the published form: 70 patients with 1 to 3 invented images of 24 x 24 pixels."""
    raw, random = tmp_path_factory.mktemp("xrays"), np.random.default_rng(0)
    files: dict[str, bytes] = {}
    lines = []
    for patient in range(70):
        split = "test" if patient % 3 == 0 else "train"
        kind = ("normal", "bacteria", "virus")[patient % 7 % 3]
        for i in range(1 + patient % 3):
            pixels = random.integers(0, 120, (24, 24)) + 120 * (kind != "normal")
            content = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(content, format="JPEG")
            name = f"{split}/{'NORMAL' if kind == 'normal' else 'PNEUMONIA'}/person{patient}_{kind}_{i}.jpeg"
            files[f"chest_xray_224/{name}"] = content.getvalue()
            lines.append((name, split, int(kind != "normal"), kind, f"{split}:person{patient}", ""))
    (raw / "chest_xray_224.tar").write_bytes(packed(files))
    table = pd.DataFrame(lines, columns=["file", "split", "label", "subtype", "patient_key", "sha256"])
    table.to_csv(raw / "manifest.csv", index=False)
    return raw


@pytest.fixture(scope="session")
def glands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of the published form: 72 invented masks, of 12 x 12 x 12 voxels."""
    raw, random = tmp_path_factory.mktemp("glands"), np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("val", 12), ("test", 20)):
        labels = random.integers(0, 2, (count, 1)).astype(np.uint8)
        shares = 0.1 + 0.3 * labels[:, :, None, None]
        arrays[f"{part}_images"] = np.where(random.random((count, 12, 12, 12)) < shares, 255, 0).astype(
            np.uint8
        )
        arrays[f"{part}_labels"] = labels
    np.savez_compressed(raw / "adrenalmnist3d_64.npz", allow_pickle=False, **arrays)
    return raw


def sites_of(name: str, hospitals: list[Hospital], folder: Path) -> Path:
    write_sites(find(name), hospitals, folder)
    return folder


def small(name: str, size: tuple[int, ...], private: bool) -> Study:
    """A ready study on smaller images, for one round."""
    study = load_study(ready_study(name)).model_dump(mode="json")
    study["data"]["columns"][0]["size"] = size
    study["model"]["parameters"] = {"channels": [4, 8]}
    study["algorithm"]["rounds"] = 1
    study["training"] |= {"local_epochs": None, "local_steps": 2, "patients_per_step": 4}
    study["privacy"] |= {"delta": 1e-3} if private else {}
    if not private:
        study["privacy"] = {"mode": "none"}
    return Study.model_validate(study)


@pytest.mark.parametrize("private", [False, True])
def test_chest_xrays_of_many_to_a_patient_are_learnt_from_jpegs(
    xrays: Path, tmp_path: Path, private: bool
) -> None:
    sites = sites_of("pneumonia", pneumonia(xrays), tmp_path / "sites")
    study = small("pneumonia", (16, 16), private)
    done = simulate(study, sites, tmp_path / "run", SimulationSettings(seed=1, exact_metrics=True))
    assert done.store.checkpoint(done.session, 2)


@pytest.mark.parametrize("private", [False, True])
def test_glands_are_learnt_as_volumes(glands: Path, tmp_path: Path, private: bool) -> None:
    sites = sites_of("adrenal-3d", adrenal(glands), tmp_path / "sites")
    study = small("adrenal-3d", (8, 8, 8), private)
    done = simulate(study, sites, tmp_path / "run", SimulationSettings(seed=1, exact_metrics=True))
    assert done.store.checkpoint(done.session, 2)


def test_a_child_is_at_one_site_and_its_images_names_say_nothing(xrays: Path, tmp_path: Path) -> None:
    sites = sites_of("pneumonia", pneumonia(xrays), tmp_path)
    tables = {name: pd.read_csv(sites / name / "patients.csv") for name in SITES}
    patients = [p for table in tables.values() for p in table["patient_id"].unique()]
    assert len(patients) == len(set(patients)) == 70
    published = dict(unpacked(xrays / "chest_xray_224.tar"))
    given: list[bytes] = []
    for name, table in tables.items():
        assert set(table["split"]) == {"train", "test"}
        archive = dict(unpacked(sites / name / "xrays.tar"))
        assert list(archive) == list(table["xray"])
        assert all(own.removesuffix(".jpeg").isdigit() for own in archive)
        given += archive.values()
    assert sorted(given) == sorted(published.values())


def test_an_image_keeps_its_finding(xrays: Path, tmp_path: Path) -> None:
    sites = sites_of("pneumonia", pneumonia(xrays), tmp_path)
    cohort = load_cohort(SiteFolder(sites / "ashford"), small("pneumonia", (16, 16), False), KEY)
    bright = cohort.train.features.mean(dim=1) > 0  # the invented ones with pneumonia are
    assert (bright == (cohort.train.labels == 1)).all()


def test_a_gland_keeps_its_finding(glands: Path, tmp_path: Path) -> None:
    sites = sites_of("adrenal-3d", adrenal(glands), tmp_path)
    cohort = load_cohort(SiteFolder(sites / "ashford"), small("adrenal-3d", (12, 12, 12), False), KEY)
    assert set(cohort.train.features.unique().tolist()) == {-1.0, 1.0}
    large = cohort.train.features.mean(dim=1) > -0.5  # the invented abnormal ones are
    assert (large == (cohort.train.labels == 1)).all()


@pytest.mark.parametrize(
    ("damaged", "message"), [("chest_xray_224.tar", "cannot be read"), ("manifest.csv", "holds other files")]
)
def test_damaged_xrays_are_refused(xrays: Path, tmp_path: Path, damaged: str, message: str) -> None:
    for file in xrays.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / damaged).read_bytes()
    end = 1000 if damaged.endswith(".tar") else content.rindex(b"\n", 0, -1)
    (tmp_path / damaged).write_bytes(content[:end])
    with pytest.raises(DatasetError, match=message):
        pneumonia(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", None])
def test_damaged_glands_are_refused(glands: Path, tmp_path: Path, content: bytes | None) -> None:
    whole = (glands / "adrenalmnist3d_64.npz").read_bytes()
    path = tmp_path / "adrenalmnist3d_64.npz"
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DatasetError, match=r"adrenalmnist3d_64\.npz: cannot be read"):
        adrenal(tmp_path)
    path.unlink()
    with pytest.raises(DatasetError, match="fetch the data set first"):
        adrenal(tmp_path)


def test_what_has_no_address_of_its_own_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"chest_xray_224\.tar: was packed of the files at https"
    ) as caught:
        fetch("pneumonia", tmp_path)
    assert "--mirror" in caught.value.remedy


def test_packing_twice_gives_the_same_bytes() -> None:
    files = {"b.txt": b"two", "a.txt": b"one" * 1000}
    for compress in (False, True):
        first, second = (hashlib.sha256(packed(files, compress)).hexdigest() for _ in range(2))
        assert first == second


@pytest.mark.shared
def test_the_published_xrays_become_four_sites(mirror: Path, tmp_path: Path) -> None:
    folders = prepare("pneumonia", fetch("pneumonia", tmp_path / "raw", mirror), tmp_path / "sites")
    tables = pd.concat([pd.read_csv(f / "patients.csv").assign(site=f.name) for f in folders])
    assert tables.groupby(["split", "finding"]).size().to_dict() == {
        ("train", "normal"): 1341, ("train", "bacteria"): 2530, ("train", "virus"): 1345,
        ("test", "normal"): 234, ("test", "bacteria"): 242, ("test", "virus"): 148,
    }  # fmt: skip
    assert tables.groupby("patient_id")["site"].nunique().max() == 1
    assert tables["patient_id"].nunique() == 3273
    study = load_study(ready_study("pneumonia"))
    cohort = load_cohort(SiteFolder(tmp_path / "sites" / "dunmore"), study, KEY)
    assert (len(cohort.train), len(cohort.test)) == (285, 43)
    assert float(cohort.train.features.min()) >= -1
    assert float(cohort.train.features.max()) <= 1


@pytest.mark.shared
def test_the_published_glands_become_four_sites(mirror: Path, tmp_path: Path) -> None:
    folders = prepare("adrenal-3d", fetch("adrenal-3d", tmp_path / "raw", mirror), tmp_path / "sites")
    tables = {f.name: pd.read_csv(f / "patients.csv") for f in folders}
    whole = pd.concat(tables.values())
    assert whole["patient_id"].is_unique
    assert whole.groupby(["split", "finding"]).size().to_dict() == {
        ("train", "normal"): 1005, ("train", "abnormal"): 281,
        ("test", "normal"): 229, ("test", "abnormal"): 69,
    }  # fmt: skip
    assert [len(t) for t in tables.values()] == [633, 474, 318, 159]
    cohort = load_cohort(
        SiteFolder(tmp_path / "sites" / "dunmore"), load_study(ready_study("adrenal-3d")), KEY
    )
    assert cohort.test.features.shape == (30, 14**3)
