"""Molecules: fingerprints, descriptors and tokens against what is published, and SMILES that are none."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors

from client.sources import molecules
from client.sources.molecules import TOKENS, TOO_LARGE, UNKNOWN, UNREADABLE
from common.modalities import DESCRIPTORS, MoleculeColumn
from common.table import Decoded

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
MIXED = [ASPIRIN, "CCO", "[Na+].[Cl-]", "C[C@H](N)C(=O)O", "c1ccc2[nH]ccc2c1", "[Zn+2]", "F/C=C/Br"]


def column(**changes: object) -> MoleculeColumn:
    return MoleculeColumn.model_validate({"kind": "molecule", "name": "smiles", **changes})


def read(cells: Sequence[str | None], **changes: object) -> Decoded:
    return molecules.read(column(**changes), cells, None)


def scaled(found: Decoded) -> np.ndarray:
    """Descriptors in their own units again, [records, descriptors]."""
    low, high = np.array([d.interval for d in DESCRIPTORS]).T
    return low + (found.values[:, -len(DESCRIPTORS) :] + 1) * (high - low) / 2


# --- fingerprints


def test_bits_are_those_of_rdkits_older_interface() -> None:
    found = read(MIXED, bits=2048, radius=3).values
    for row, smiles in zip(found, MIXED, strict=True):
        molecule = Chem.MolFromSmiles(smiles)
        bits = {b % 2048 for b in rdMolDescriptors.GetMorganFingerprint(molecule, 3).GetNonzeroElements()}
        assert set(np.flatnonzero(row).tolist()) == bits
    assert set(np.unique(found).tolist()) == {0.0, 1.0}


def test_bits_that_never_change() -> None:
    """Golden: ethanol has three atoms' environments of radius 0, and those of radius 1 and 2."""
    assert np.flatnonzero(read(["CCO"]).values[0]).tolist() == [33, 80, 222, 294, 386, 807]


def test_ways_of_writing_a_molecule_are_the_same() -> None:
    for kind in ({}, {"descriptors": True}, {"representation": "tokens"}):
        found = read([ASPIRIN, "OC(=O)c1ccccc1OC(C)=O", "O=C(C)OC1=CC=CC=C1C(O)=O"], **kind).values
        assert (found == found[0]).all()


def test_descriptors_of_aspirin() -> None:
    """PubChem CID 2244: 180.16 g/mol, 63.6 Angstrom2, 3 rotatable bonds, 1 donor, 13 heavy atoms."""
    found = dict(
        zip((d.name for d in DESCRIPTORS), scaled(read([ASPIRIN], descriptors=True))[0], strict=True)
    )
    assert found["molecular weight"] == pytest.approx(180.16, abs=0.01)
    assert found["polar surface"] == pytest.approx(63.6, abs=0.01)
    for name, number in {
        "hydrogen-bond donors": 1,
        "heavy atoms": 13,
        "rings": 1,
        "aromatic rings": 1,
        "charge": 0,
        "halogens": 0,
        "share of sp3 carbons": 1 / 9,
    }.items():
        assert found[name] == pytest.approx(number, abs=1e-4), name
    halogens = scaled(read(["FC(Cl)(Br)I", "[Cl-]"], descriptors=True))
    assert halogens[:, -2:].round(4).tolist() == [[4, 0], [1, -1]]


def test_descriptors_stay_within_three() -> None:
    found = read(["C" * 900, "[Fe+3].[Fe+3].[Fe+3].[O-2]"], descriptors=True)
    assert not found.problems
    assert np.abs(found.values).max() == 3.0


def test_the_width_is_known_from_the_study() -> None:
    assert read(MIXED, bits=64).values.shape == (7, 64)
    assert read(MIXED, bits=64, descriptors=True).values.shape == (7, 64 + len(DESCRIPTORS))
    assert len(molecules._PROPERTIES) + 2 == len(DESCRIPTORS)
    with pytest.raises(ValidationError, match="descriptors go with a fingerprint"):
        column(representation="tokens", descriptors=True)


# --- tokens


def tokens(cell: str, **changes: object) -> list[str]:
    ids = read([cell], representation="tokens", **changes).values[0]
    return [TOKENS[int(i) - 1] if i != UNKNOWN else "?" for i in ids if i]


def test_tokens_make_the_canonical_smiles_again() -> None:
    for smiles in MIXED:
        canonical = Chem.MolToSmiles(Chem.MolFromSmiles(smiles))
        assert "".join(tokens(smiles)) == canonical
    assert tokens("[Zn+2]") == ["[Zn+2]"]
    assert sorted(tokens("[U].CBr")) == [".", "?", "Br", "C"]
    assert tokens("C" * 40, tokens=7) == ["C"] * 7


def test_the_vocabulary_is_fixed() -> None:
    assert len(set(TOKENS)) == len(TOKENS) < UNKNOWN < column(representation="tokens").vocabulary
    assert [TOKENS.index(t) for t in (".", "C", "[C@H]", "[Pb]")] == [0, 30, 45, 120]
    assert all(molecules._TOKEN.fullmatch(token) for token in TOKENS)


# --- what is no molecule


GARBAGE = {
    "words": "acetylsalicylic acid",
    "a name behind it": "CCO ethanol",
    "an extension": "CCO |$;;R1$|",
    "open ring": "c1ccccc",
    "open bracket": "[Na+",
    "five bonds": "C(C)(C)(C)(C)C",
    "aromatic that is none": "c1cccc1",
    "letters": "xyz",
    "not ASCII": "CC–O",
    "control characters": "C\x00C\nC",
    "nothing at all": "()",
    "a number": "8675309",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_smiles_is_a_problem_of_its_record(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    for form in ({}, {"representation": "tokens"}):
        found = read([ASPIRIN, GARBAGE[kind], None], **form)
        assert {k: v.tolist() for k, v in found.problems.items()} == {UNREADABLE: [1]}
        assert np.isnan(found.values).all(axis=1).tolist() == [False, True, True]
    said = capfd.readouterr()
    assert said.out + said.err == ""  # RDKit would quote it


def test_molecules_that_are_too_large() -> None:
    found = read(["C" * 4001, "C" * 1001, "C" * 1000])
    assert {k: v.tolist() for k, v in found.problems.items()} == {TOO_LARGE: [0, 1]}


def test_garbage_never_crashes_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(7)
    letters = "CNOcnos()[]=#+-123@HBrl%/\\."
    cells = ["".join(draw.choices(letters, k=draw.randrange(1, 25))) for _ in range(500)]
    for smiles in MIXED:
        for _ in range(60):
            cut = list(smiles)
            cut[draw.randrange(len(cut))] = draw.choice(letters)
            cells.append("".join(cut))
    for form in ({"descriptors": True}, {"representation": "tokens"}):
        found = read(cells, **form)
        told = {int(p) for each in found.problems.values() for p in each}
        assert told == set(np.flatnonzero(np.isnan(found.values).any(axis=1)).tolist())
        assert 0 < len(told) < len(cells)
    said = capfd.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize("form", [{}, {"descriptors": True}, {"representation": "tokens"}])
def test_no_records_numbers_depend_on_another_record(form: dict[str, object]) -> None:
    cells = [*MIXED, None, "no molecule", *MIXED[:2]]
    together = read(cells, **form).values
    for i, cell in enumerate(cells):
        np.testing.assert_array_equal(read([cell], **form).values[0], together[i])
    np.testing.assert_array_equal(read(cells[::-1], **form).values[::-1], together)


# --- the real data


@pytest.mark.shared
def test_aqsoldb(mirror: Path) -> None:
    path = mirror / "aqsoldb" / "data_curated.csv"
    if not path.exists():
        pytest.skip(f"no real data: {path} is absent")
    table = pd.read_csv(path).iloc[::20]
    found = read(table["SMILES"].str.strip().tolist(), descriptors=True)
    assert sum(len(each) for each in found.problems.values()) <= 2
    numbers = scaled(found)
    published = {"MolWt": 0, "MolLogP": 1, "TPSA": 3, "NumHAcceptors": 4, "NumHDonors": 5, "RingCount": 7}
    published |= {"NumAromaticRings": 8, "HeavyAtomCount": 9, "MolMR": 2, "NumRotatableBonds": 6}
    for name, i in published.items():
        theirs = table[name].to_numpy(dtype=float)
        low, high = DESCRIPTORS[i].interval
        inside = ~np.isnan(numbers[:, i]) & (np.abs(2 * (theirs - low) / (high - low) - 1) < 3)
        close = np.abs(numbers[inside, i] - theirs[inside]) <= 1e-3 * (high - low)
        assert inside.mean() > 0.99, name
        # RDKit counts other acceptors since; all else agrees
        assert close.mean() > (0.9 if name == "NumHAcceptors" else 0.999), name
    ids = read(table["SMILES"].str.strip().tolist(), representation="tokens").values
    assert np.nanmean(ids == UNKNOWN) < 0.001
    assert re.fullmatch(r"[!-~]+", "".join(TOKENS))
