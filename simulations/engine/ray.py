"""The same apps on Flower's own simulation runtime, whose workers are Ray's.

Slower to start than the in-process engine, and slower per round: it polls, and every message opens its
site's vault anew. It is for sites whose work needs more machines than one. Ray's processes listen on
every interface of the machine, and SuperLink trusts whoever reaches its loopback port.

A Ray cluster: start it with Ray's own commands, set `RAY_ADDRESS` (e.g. `head-node:6379`), and Flower's
back end joins it instead of starting Ray here; Flower has no setting of its own for that. The cluster then
decides how many sites work at the same time (one per CPU), not `workers`. Every machine needs fedward
installed, and the folders of sites and of the run under the same paths, on a file system with locks.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from common.errors import DeploymentError, StudyFailed
from common.study import Study
from server.store import FAILED, FINISHED
from simulations.engine.manifest import MANIFEST_VARIABLE, write_manifest
from simulations.engine.simulation import Simulation, SimulationSettings, prepare
from simulations.engine.superlink import SuperLink, superlink

RAY_ADDRESS = "RAY_ADDRESS"
PROGRESS_PAUSE = 0.5  # seconds between looks at the store
FLOWER_PAUSE = 15.0  # seconds between questions to Flower, each of which is a process
FIRST_ROUND_SECONDS = 600.0  # Ray takes 10 s to start, and much longer on a busy machine


def simulate_on_ray(
    study: Study,
    sites: Path,
    run: Path,
    settings: SimulationSettings,
    watch: Callable[[int], None] = lambda done: None,
) -> Simulation:
    """Run a study on Flower's simulation runtime; see `simulate`, whose results it repeats bit for bit.

    Args:
        settings: `memory_bytes` has no meaning here: a worker holds one site's data at a time.

    Raises:
        StudyFailed: if a site refuses or cannot answer and the quorum is missed.
        SiteError, StudyError: if a site or the study is wrong.
        DeploymentError: if Flower or Ray cannot be started, or ends before the session does.
    """
    run = run.resolve()
    simulation = prepare(study, sites, run, settings)
    places = simulation.places
    manifest = write_manifest(run / "manifest.json", places, settings.seed)
    workers = max(1, min(settings.workers, len(places)))
    with (
        _ray_variables() as ray,
        superlink(run / "flower", {MANIFEST_VARIABLE: str(manifest), **ray}) as link,
    ):
        federation = {"num-supernodes": len(places), "client-resources-num-cpus": 1}
        if not os.environ.get(RAY_ADDRESS):
            federation["init-args-num-cpus"] = workers  # Ray refuses it when joining a cluster
        config: dict[str, bool | str] = {"store": str(run / "store"), "session": simulation.session}
        config["volatile"] = True
        _follow(link, link.submit(config, federation), simulation, watch)
    return simulation


@contextmanager
def _ray_variables() -> Iterator[Mapping[str, str]]:
    """What Ray learns by its environment: which cluster to join, or to start one of its own, and where.

    Left alone, Ray would join any cluster that someone has started on this machine. The names of its
    sockets are long, so they get a short folder of their own.
    """
    address = os.environ.get(RAY_ADDRESS)
    if address:
        yield {RAY_ADDRESS: address}
        return
    with tempfile.TemporaryDirectory(prefix="fedward-", ignore_cleanup_errors=True) as folder:
        yield {
            RAY_ADDRESS: "local",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
        }


def _follow(link: SuperLink, run_id: int, simulation: Simulation, watch: Callable[[int], None]) -> None:
    """Wait for the session's end as the store tells it; ask Flower now and then whether it still runs.

    Once the session has ended all is in the store, so Flower's own end need not be waited for.
    """
    store, session = simulation.store, simulation.session
    started = asked = time.monotonic()
    while (found := store.session(session)).status not in {FINISHED, FAILED}:
        done = store.rounds_done(session)
        watch(done)
        now = time.monotonic()
        if not link.running:
            raise _broken(link, "SuperLink has ended")
        if not done and now - started > FIRST_ROUND_SECONDS:
            raise _broken(link, f"no round within {FIRST_ROUND_SECONDS:g} s")
        if now - asked > FLOWER_PAUSE:
            asked = now
            outcome = link.outcome(run_id)
            if outcome.startswith("finished") and store.session(session).status not in {FINISHED, FAILED}:
                raise _broken(link, f"Flower says {outcome}")
        time.sleep(PROGRESS_PAUSE)
    watch(store.rounds_done(session))
    if found.status == FAILED:
        raise StudyFailed(found.detail or "the session failed", remedy=f"see {link.log}")


def _broken(link: SuperLink, what: str) -> DeploymentError:
    return DeploymentError(
        f"Flower's simulation runtime failed ({what}): {link.told()[-500:]}",
        remedy=f"see {link.log}; the in-process engine needs neither SuperLink nor Ray",
    )
