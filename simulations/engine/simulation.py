"""One simulated session, from a study and a folder of sites to a run folder."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, RecordDict

from client import door, stacking
from client.app import app as client_app
from common.errors import SiteError
from common.models.initial import read_initial
from common.study import Study
from server.app import app as server_app
from server.sessions import new_session_id
from server.store import Settings, Store
from simulations.engine.direct import DirectGrid
from simulations.engine.inprocess import RUN_ID
from simulations.engine.sites import SitePlace, VaultPool, admit, find_sites, warm_capacity
from simulations.engine.together import Pace

PROGRESS_PAUSE = 0.2  # seconds between looks at the store
SELDOM = 10  # times as rarely as Python's own choice


@dataclass(frozen=True)
class SimulationSettings:
    """Attributes:
    workers: threads at most; where a training step is short, one thread does it all, and faster.
    seed: of everything random, for a run that repeats; None takes the operating system's randomness.
    exact_metrics: evaluate without noise, on data that is public anyway.
    memory_bytes: sites stay in memory while their data is estimated to fit in this.
    quorum: a round counts if at least so many sites answered; None: all.
    initial: the file of weights that the study names, if it names one.
    """

    workers: int = 2
    seed: int | None = None
    exact_metrics: bool = False
    memory_bytes: int = 4 << 30
    quorum: int | None = None
    describe: bool = False
    state: Path | None = None
    initial: Path | None = None


@dataclass(frozen=True)
class Simulation:
    """Attributes:
    folder: of the run: store/ (rounds, checkpoints) and sites/ (each site's policy and ledger).
    places: of the sites, in the order of their nodes.
    """

    folder: Path
    session: str
    store: Store
    places: tuple[SitePlace, ...]


def prepare(study: Study, sites: Path, run: Path, settings: SimulationSettings) -> Simulation:
    """Make the run's folder: each site admits the study, the coordinator writes down the session.

    Raises:
        SiteError, StudyError: if a site or the study is wrong.
    """
    initial = None if settings.describe else read_initial(study, settings.initial)
    places = find_sites(sites, settings.state or run / "sites")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SiteError(f"{run}: {error.strerror}", remedy="give another folder: --out") from None
    for place in places:
        admit(place, study, public=settings.exact_metrics)
    store = Store(run / "store", durable=False)
    session = new_session_id(study)
    if initial is not None:
        store.keep_initial(session, initial)
    store.create(
        session,
        study,
        Settings(
            sites=len(places),
            quorum=settings.quorum or len(places),
            deadline=24 * 3600.0,
            exact_metrics=settings.exact_metrics,
            describe=settings.describe,
            seed=settings.seed or 0,
        ),
    )
    return Simulation(run, session, store, places)


def simulate(
    study: Study,
    sites: Path,
    run: Path,
    settings: SimulationSettings,
    watch: Callable[[int], None] = lambda done: None,
) -> Simulation:
    """Run a study in this process: Flower's ServerApp leads, and its grid asks the vaults without messages.

    Args:
        sites: folder of site folders; only read.
        run: folder for everything that the run leaves.
        watch: told the number of finished rounds now and then.

    Raises:
        StudyFailed: if a site refuses or cannot answer and the quorum is missed.
        SiteError, StudyError: if a site or the study is wrong.
    """
    simulation = prepare(study, sites, run, settings)
    places = simulation.places
    workers = max(1, min(settings.workers, len(places)))
    capacity = warm_capacity(study, places, workers, settings.memory_bytes)
    small = stacking.may_stack(study)
    pace = Pace(stacking.together, workers)
    pool = VaultPool(places, settings.seed, capacity, pace)
    grid = DirectGrid(
        client_app,
        len(places),
        workers,
        pool.outcomes,
        together=capacity if small else workers,
        threads=pace.threads,
        pulse=_told_now_and_then(simulation, watch),
    )
    config = {"store": str(run / "store"), "session": simulation.session, "volatile": True}
    context = Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    door.install(pool.resolve)
    gc.freeze()  # all that was imported: to look through it for garbage takes longer than many rounds
    young, middle, old = gc.get_threshold()
    if small:  # nor often through all that many sites keep; of other networks, garbage may hold activations
        gc.set_threshold(SELDOM * young, middle, old)
    try:
        server_app(grid, context)
    finally:
        gc.set_threshold(young, middle, old)
        gc.unfreeze()
        grid.close()
        door.install(None)
        pool.close()
        watch(simulation.store.rounds_done(simulation.session))
    return simulation


def _told_now_and_then(simulation: Simulation, watch: Callable[[int], None]) -> Callable[[], None]:
    """Tells `watch` how far the session is, at most once in `PROGRESS_PAUSE`."""
    last = 0.0

    def pulse() -> None:
        nonlocal last
        now = time.monotonic()
        if now >= last + PROGRESS_PAUSE:
            last = now
            watch(simulation.store.rounds_done(simulation.session))

    return pulse
