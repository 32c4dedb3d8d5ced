"""Molecules by their SMILES: fingerprints with descriptors, or token ids. RDKit reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rdkit import Chem, rdBase
from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

from client.settings import Where
from common.modalities import DESCRIPTORS, MoleculeColumn
from common.table import Decoded

UNREADABLE = "not a SMILES that RDKit can read"
TOO_LARGE = "a molecule beyond 1000 heavy atoms, or a SMILES beyond 4000 characters"

_LONGEST, _MOST_ATOMS = 4000, 1000
_FURTHEST = 3.0  # a scaled descriptor, as a scaled value of a series

_TOKEN = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>|\*|\$|%[0-9]{2}|[0-9]"
)
_BONDS = ". - = # $ : / \\ ( ) ~ * + @ ? > 0 1 2 3 4 5 6 7 8 9 %10 %11 %12"
_ATOMS = "B C N O P S F Cl Br I b c n o s p"
_BRACKETS = """
    [C@H] [C@@H] [C@] [C@@] [CH] [CH-] [CH2] [CH3] [C-] [C+] [C] [N+] [N-] [NH+] [NH2+] [NH3+] [NH4+] [N@+]
    [N@@+] [nH] [n+] [n-] [nH+] [O-] [O+] [O] [OH] [OH-] [O-2] [o+] [S] [S-] [S+] [S@] [S@@] [S-2] [s+] [P+]
    [P@] [P@@] [PH] [B-] [Si] [Se] [se] [As] [Te] [F-] [Cl-] [Br-] [I-] [I+] [H+] [H-] [2H] [Li+] [Na+] [Na]
    [K+] [Mg+2] [Ca+2] [Sr+2] [Ba+2] [Al+3] [Zn+2] [Cu+2] [Cu+] [Fe+2] [Fe+3] [Co+2] [Ni+2] [Mn+2] [Cr+3]
    [Ag+] [Sn] [Pb]
"""
TOKENS: tuple[str, ...] = (*_BONDS.split(), *_ATOMS.split(), *_BRACKETS.split())
"""Token i has the id i + 1. It is fixed: what a network learnt hangs on it."""
UNKNOWN = 127  # id of every other token
_IDS = {token: i for i, token in enumerate(TOKENS, start=1)}

_Numbers = Callable[[Any], Sequence[float] | npt.NDArray[np.float64]]
# RDKit's names of `DESCRIPTORS` but the last two, in their order; Crippen's: Wildman & Crippen 1999.
_PROPERTIES = (
    *("amw", "CrippenClogP", "CrippenMR", "tpsa", "NumHBA", "NumHBD", "NumRotatableBonds"),
    *("NumRings", "NumAromaticRings", "NumHeavyAtoms", "FractionCSP3"),
)
_HALOGENS = frozenset({9, 17, 35, 53})


def read(column: MoleculeColumn, cells: Sequence[str | None], where: Where | None) -> Decoded:
    """Each record's molecule, float32 [records, width].

    `fingerprint`: bits of Morgan's fingerprint (Rogers & Hahn 2010, "Extended-connectivity fingerprints"),
    then, if the study asks for them, `common.modalities.DESCRIPTORS` scaled to [-1, 1] by their intervals and
    kept within ±3. `tokens`: ids of the canonical SMILES's tokens (Schwaller et al. 2018, "Found in
    translation"), 0 = none. The canonical form is that of the installed RDKit.
    """
    numbers = _tokens(column) if column.representation == "tokens" else _fingerprint(column)
    values = np.full((len(cells), column.width), np.nan, dtype=np.float32)
    problems: dict[str, list[int]] = {}
    with rdBase.BlockLogs():  # they quote the SMILES
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            found = _read(cell, numbers)
            if isinstance(found, str):
                problems.setdefault(found, []).append(i)
            else:
                values[i] = found
    return Decoded(values, {problem: np.array(each, dtype=np.int64) for problem, each in problems.items()})


def _read(smiles: str, numbers: _Numbers) -> npt.NDArray[np.float32] | str:
    if len(smiles) > _LONGEST:
        return TOO_LARGE
    if not re.fullmatch(r"[!-~]+", smiles):  # after a space a name may follow, and RDKit would let it pass
        return UNREADABLE
    try:
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None or molecule.GetNumAtoms() == 0:
            return UNREADABLE
        if molecule.GetNumHeavyAtoms() > _MOST_ATOMS:
            return TOO_LARGE
        found = np.asarray(numbers(molecule), dtype=np.float32)
    except (ValueError, RuntimeError):  # what RDKit's exceptions are in Python; they quote, too
        return UNREADABLE
    return found if np.isfinite(found).all() else UNREADABLE


def _fingerprint(column: MoleculeColumn) -> _Numbers:
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=column.radius, fpSize=column.bits)
    properties = rdMolDescriptors.Properties(list(_PROPERTIES))
    low, high = np.array([d.interval for d in DESCRIPTORS]).T

    def numbers(molecule: Any) -> npt.NDArray[np.float64]:
        bits = np.asarray(generator.GetFingerprintAsNumPy(molecule), dtype=np.float64)
        if not column.descriptors:
            return bits
        halogens = sum(atom.GetAtomicNum() in _HALOGENS for atom in molecule.GetAtoms())
        raw = np.array([*properties.ComputeProperties(molecule), halogens, Chem.GetFormalCharge(molecule)])
        scaled = 2.0 * (raw - low) / (high - low) - 1.0
        return np.concatenate([bits, scaled.clip(-_FURTHEST, _FURTHEST)])

    return numbers


def _tokens(column: MoleculeColumn) -> _Numbers:
    def numbers(molecule: Any) -> npt.NDArray[np.float64]:
        ids = [_IDS.get(t, UNKNOWN) for t in _split(Chem.MolToSmiles(molecule), column.tokens)]
        return np.array(ids + [0] * (column.tokens - len(ids)), dtype=np.float64)

    return numbers


def _split(smiles: str, most: int) -> Iterator[str]:
    for i, match in enumerate(_TOKEN.finditer(smiles)):
        if i == most:
            return
        yield match.group()
