"""The vaults of a simulation: opened on demand, kept warm while their data fits in memory."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from client.door import Answer
from client.policy import approval_of
from client.policy_file import approve, load_policy, set_policy
from client.settings import SiteFolder
from client.site import make_site_keys, open_vault
from client.tasks import Working
from client.vault import Vault
from common.errors import PolicyForbids, SiteError
from common.privacy.noise import Seeded
from common.privacy.plan import plan_study
from common.study import Study
from simulations.engine.together import Do, Outcome, answered, one_by_one

SITE_KEY = "site-index"
# A simulated cohort's lifetime, unless a policy lies in its state folder already: one study fits.
AMPLE_EPSILON, AMPLE_DELTA = 1000.0, 1e-2
DATA_GROWTH = 4  # tensors and tables in memory ÷ bytes on disk, a cautious guess


@dataclass(frozen=True)
class SitePlace:
    """Attributes:
    root: folder with site.toml and data, only read.
    state: folder of this run's policy and ledger.
    """

    root: Path
    state: Path

    def folder(self) -> SiteFolder:
        return self._folder

    @cached_property
    def _folder(self) -> SiteFolder:
        return SiteFolder(self.root, self.state)


def find_sites(sites: Path, states: Path) -> tuple[SitePlace, ...]:
    """The sites in a folder of site folders, in the order of their names.

    Args:
        states: folder that gets one folder a site.

    Raises:
        SiteError: if there is none, one is wrong, or two have the same name.
    """
    if not sites.is_dir():
        raise SiteError(f"{sites}: no such folder", remedy="make one: fedward-sim datasets fetch NAME")
    roots = sorted(path.parent for path in sites.glob("*/site.toml"))
    if not roots:
        raise SiteError(f"{sites}: no folder in it has a site.toml", remedy="give the folder of sites")
    names = [SiteFolder(root).name for root in roots]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SiteError(f"{sites}: two sites are named {sorted(twice)[0]}", remedy="give each its own name")
    return tuple(SitePlace(root, states / name) for root, name in zip(roots, names, strict=True))


def admit(place: SitePlace, study: Study, public: bool) -> None:
    """Play the site's operator: approve the study for one session, if it isn't, as the policy allows.

    Args:
        public: the researcher says that this cohort is public, so exact metrics are allowed.

    Raises:
        StudyError, SiteError: as a real approval would.
    """
    place.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = place.folder()
    make_site_keys(folder)
    if not folder.policy_path.exists():
        ample = {"epsilon": AMPLE_EPSILON, "delta": AMPLE_DELTA}
        set_policy(folder, {"cohort": ample}, durable=False)
    policy = load_policy(folder)
    if policy.standing(study.digest) is not None:
        return
    wanted = approval_of(study, "simulation", public=public or not study.private)
    plan = plan_study(study, folder.file.site.public_size, policy.limits(wanted))
    with suppress(PolicyForbids):  # then the vault refuses, as a real one would
        approve(folder, study, wanted, plan, durable=False)


def open_simulated(place: SitePlace, seed: int | None) -> Vault:
    """A site's vault as a simulation runs it: seeded if asked, its ledger not synced to disk."""
    folder = place.folder()
    if seed is None:
        return open_vault(folder, durable=False, prompt=False)
    seeded = Seeded(seed)
    split = seeded.key("split", folder.name)
    return open_vault(folder, randomness=seeded, split_key=split, durable=False, prompt=False)


class VaultPool:
    """Opens vaults on demand and closes the longest unused ones beyond `capacity`.

    Args:
        capacity: vaults kept open at a time, at least 1; a busy one is never closed.
        do: trains and evaluates; see `simulations.engine.together`.
    """

    def __init__(
        self, places: tuple[SitePlace, ...], seed: int | None, capacity: int, do: Do = one_by_one
    ) -> None:
        self._places, self._seed, self._capacity = places, seed, max(1, capacity)
        self._do = do
        self._open: OrderedDict[int, Vault] = OrderedDict()
        self._busy: set[int] = set()
        self._changed = threading.Condition()

    def resolve(self, node_config: Mapping[str, object]) -> Answer:
        """The vault of a node (see `client.door.install`)."""
        index = site_index(node_config)
        return lambda request: self._answer(index, request)

    def outcomes(self, requests: Mapping[int, bytes]) -> dict[int, Outcome]:
        """Answer the requests of some sites side by side.

        Args:
            requests: site → its request.

        Returns:
            Site → its answer, or why its vault could not be opened.
        """
        failed: dict[int, Outcome] = {}
        working: dict[int, Working] = {}
        taken = self._take(sorted(requests))
        try:
            for index, vault in taken.items():
                try:
                    vault = taken[index] = vault or open_simulated(self._places[index], self._seed)
                    working[index] = vault.working(requests[index])
                except Exception as error:
                    failed[index] = error
            answers = answered(working, self._do)
        finally:
            self._give_back(taken)
        return failed | answers

    def _answer(self, index: int, request: bytes) -> bytes:
        outcome = self.outcomes({index: request})[index]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _take(self, wanted: Sequence[int]) -> dict[int, Vault | None]:
        """All at once, so that two threads never wait for each other."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy.isdisjoint(wanted))
            self._busy.update(wanted)
            taken = {index: self._open.pop(index, None) for index in wanted}
            try:
                while self._open and len(self._open) + len(self._busy) > self._capacity:
                    _, oldest = self._open.popitem(last=False)
                    oldest.close()
            except BaseException:
                self._give_back(taken)
                raise
        return taken

    def _give_back(self, taken: Mapping[int, Vault | None]) -> None:
        with self._changed:
            self._busy.difference_update(taken)
            self._open.update((index, vault) for index, vault in taken.items() if vault is not None)
            self._changed.notify_all()

    def close(self) -> None:
        """Close every vault."""
        for vault in self._open.values():
            vault.close()
        self._open.clear()


def site_index(node_config: Mapping[str, object]) -> int:
    """The number of a simulated node's site."""
    return int(str(node_config[SITE_KEY]))


def warm_capacity(study: Study, places: tuple[SitePlace, ...], workers: int, memory_bytes: int) -> int:
    """How many sites may stay in memory: all, if their data fits; else one for each worker.

    A table takes a multiple of its bytes on disk; images and series, which may be compressed, what a record
    of so many features for each declared patient does.
    """
    wide = sum(column.width for column in study.data.wide)
    size = 0
    for place in places:
        folder = place.folder()
        size += DATA_GROWTH * _bytes_on_disk(folder.data_path)
        size += 2 * 4 * wide * folder.file.site.public_size  # float32, and once more while it is sorted
    return len(places) if size <= memory_bytes else workers


def _bytes_on_disk(path: Path) -> int:
    if path.is_dir():
        return sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    return path.stat().st_size if path.exists() else 0
