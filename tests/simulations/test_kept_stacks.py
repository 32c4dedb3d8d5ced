"""What is kept of sites that train together: memory, but neither randomness nor patients."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
from small import WIDTH, allow, job, make_site, study

from client import stack, stacking
from client.settings import SiteFolder
from client.site import open_vault, read_split_key
from client.stack import Stack
from client.tasks import Training
from client.training import Trainer
from client.vault import Vault
from client.withdrawal import withdraw
from common.messages import Arrays, Reply, decode
from common.privacy.noise import Randomness, Seeded, Stream
from common.study import Study
from simulations.engine.together import Pace, answered

SITES, PATIENTS = 3, 60
MLP = {"name": "mlp", "parameters": {"hidden": [5]}}
PUBLIC = study(
    model=MLP,
    privacy={"mode": "none"},
    training={"sample_rate": None, "patients_per_step": 8, "local_steps": 5,
              "optimizer": {"name": "adam", "learning_rate": 0.05}},
)  # fmt: skip
PRIVATE = study(model=MLP, training={"sample_rate": 0.5, "local_steps": 3})
BOTH = pytest.mark.parametrize("wanted", [PUBLIC, PRIVATE], ids=["public", "private"])


class Recorded:
    """Fresh keys, as the operating system's, and what each was asked for."""

    protective = True

    def __init__(self) -> None:
        self.asked: list[tuple[str | int, ...]] = []

    def stream(self, purpose: str, *context: str | int) -> Stream:
        self.asked.append((purpose, *context))
        return Stream(os.urandom(32))


def write_patients(root: Path, seed: int, *, poisoned: bool = False) -> None:
    """One record each; a poisoned patient's label is the other one, and his features are at their ends."""
    random = np.random.default_rng(seed)
    lines = ["patient_id," + ",".join(f"x_{i}" for i in range(WIDTH)) + ",y"]
    for p in range(PATIENTS):
        x = random.uniform(-1, 1, WIDTH)
        if poisoned and p == 7:
            x = np.full(WIDTH, -1.0)
        label = int(x.sum() > 0) if p != 7 else 1
        lines.append(",".join([f"patient-{p}", *(f"{v:.6f}" for v in x), str(label)]))
    (root / "patients.csv").write_text("\n".join(lines) + "\n")


def site(root: Path, wanted: Study, seed: int) -> SiteFolder:
    folder = make_site(root, name=root.name)
    write_patients(root, seed)
    allow(folder, wanted, public=not wanted.private)
    return folder


@contextmanager
def vaults_of(folders: Sequence[SiteFolder], randomness: Randomness | None = None) -> Iterator[list[Vault]]:
    with ExitStack() as closing:
        vaults = []
        for folder in folders:
            vault = open_vault(folder, randomness=randomness or Seeded(1), durable=False, prompt=False)
            closing.callback(vault.close)
            vaults.append(vault)
        yield vaults


def folders_of(root: Path, wanted: Study) -> list[SiteFolder]:
    return [site(root / f"site-{i}", wanted, i) for i in range(SITES)]


def updates(vaults: Sequence[Vault], wanted: Study, number: int) -> list[Arrays]:
    """All from the same global model, whatever the round."""
    request = job(wanted, number)
    requests = {i: vault.working(request) for i, vault in enumerate(vaults)}
    told = answered(requests, Pace(stacking.together, 1))
    replies = [decode(bytes(told[i])) for i in range(len(vaults))]
    return [reply.update for reply in replies if isinstance(reply, Reply)]


def bits(found: Sequence[Arrays]) -> list[dict[str, bytes]]:
    assert len(found) == SITES
    return [{name: np.asarray(value).tobytes() for name, value in each.items()} for each in found]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sites trained in one stack, each time that some did; none may fall back to training alone."""
    seen: list[int] = []

    def counted(train: Callable[[Sequence[Training]], Any]) -> Callable[[Sequence[Training]], Any]:
        def call(trainings: Sequence[Training]) -> Any:
            done = train(trainings)
            seen.append(len(trainings))
            return done

        return call

    for name in ("train_together", "train_privately"):
        monkeypatch.setattr(stacking, name, counted(getattr(stacking, name)))
    return seen


@BOTH
def test_each_round_draws_its_own_streams(tmp_path: Path, trained: list[int], wanted: Study) -> None:
    """From the same model on the same patients, no two rounds and no two sites give the same update."""
    randomness = Recorded()
    with vaults_of(folders_of(tmp_path, wanted), randomness) as vaults:
        found = [bits(updates(vaults, wanted, number)) for number in (1, 2, 3)]
    assert trained == [SITES] * 3
    told = [each["0.weight"] for of_round in found for each in of_round]
    assert len(set(told)) == 3 * SITES
    purposes = ("sampling", "noise") if wanted.private else ("sampling",)
    asked = [(p, f"site-{i}", wanted.digest, r) for r in (1, 2, 3) for i in range(SITES) for p in purposes]
    assert sorted(map(repr, randomness.asked)) == sorted(map(repr, asked))


def test_batches_are_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the noise alone: who takes part in the steps of a round is drawn in that round."""
    drawn: list[bytes] = []
    real = stacking._drawn

    def recorded(training: Training) -> Any:
        found = real(training)
        drawn.append(found.records.tobytes())
        return found

    monkeypatch.setattr(stacking, "_drawn", recorded)
    with vaults_of(folders_of(tmp_path, PUBLIC), Recorded()) as vaults:
        for number in (1, 2, 3):
            updates(vaults, PUBLIC, number)
    assert len(drawn) == len(set(drawn)) == 3 * SITES


def test_a_kept_stack_ends_where_a_new_one_does(
    tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: neither weights nor the optimiser's state of an earlier round are left in it."""
    used: list[Stack] = []
    real = stack.stack_of

    def recorded(trainer: Trainer, sites: int) -> Stack:
        used.append(real(trainer, sites))
        return used[-1]

    monkeypatch.setattr(stacking, "stack_of", recorded)
    with vaults_of(folders_of(tmp_path / "kept", PUBLIC)) as vaults:
        updates(vaults, PUBLIC, 1)
        kept = bits(updates(vaults, PUBLIC, 2))
    assert used[0] is used[1]
    stack._STACKS.clear()
    same = [SiteFolder(tmp_path / "kept" / f"site-{i}") for i in range(SITES)]
    for folder in same:  # a ledger that knows nothing yet, of the same patients
        for path in (folder.ledger_path, *folder.replies.iterdir()):
            path.unlink()
    with vaults_of(same) as vaults:
        assert bits(updates(vaults, PUBLIC, 2)) == kept
    assert used[2] is not used[0]
    assert trained == [SITES] * 3


@BOTH
def test_who_withdrew_is_in_no_later_round(tmp_path: Path, trained: list[int], wanted: Study) -> None:
    """With or without what only a withdrawn patient's record says, the round is the same bit for bit."""
    found: list[list[list[dict[str, bytes]]]] = []
    keys = []
    for poisoned in (False, True):
        root = tmp_path / str(poisoned)
        folders = folders_of(root, wanted)
        for folder in folders:
            write_patients(folder.root, seed=9, poisoned=poisoned)
            folder.split_key_path.write_bytes(b"s" * 32)
        keys.append(read_split_key(folders[0]))
        with vaults_of(folders) as vaults:
            before = bits(updates(vaults, wanted, 1))
            for folder in folders:
                withdraw(folder, keys[-1], ["patient-7"])
            found.append([before, bits(updates(vaults, wanted, 2))])
    assert keys[0] == keys[1]
    assert trained == [SITES] * 4
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


@BOTH
def test_changed_data_are_trained_on_and_the_old_ones_let_go(
    tmp_path: Path, trained: list[int], wanted: Study
) -> None:
    folders = folders_of(tmp_path, wanted)
    with vaults_of(folders) as vaults:
        first = bits(updates(vaults, wanted, 1))
        old = [ref(trainer) for vault in vaults for trainer in vault._warm._trainers.values()]
        assert len(old) == SITES
        for i, folder in enumerate(folders):
            write_patients(folder.root, seed=100 + i)
        changed = bits(updates(vaults, wanted, 2))
        gc.collect()
        assert [each() for each in old] == [None] * SITES
        kept = {id(t) for vault in vaults for t in vault._warm._trainers.values()}
        assert {id(trainer) for trainer in stack._STACKS} <= kept
    assert trained == [SITES] * 2
    assert changed != first
    again = folders_of(tmp_path / "new", wanted)
    for i, folder in enumerate(again):
        write_patients(folder.root, seed=100 + i)
        folder.split_key_path.write_bytes(read_split_key(folders[i]))
    stack._STACKS.clear()
    with vaults_of(again) as vaults:
        assert bits(updates(vaults, wanted, 2)) == changed
