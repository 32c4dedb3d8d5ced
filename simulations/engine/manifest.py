"""What a worker of Flower's simulation runtime must know: where the sites of this run are.

The file lies in the run's folder and its path travels in an environment variable that we set, so that
nothing a coordinator sends decides which folder a worker opens.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import DeploymentError
from common.files import Strict, load_config, write_atomic
from simulations.engine.sites import SitePlace

MANIFEST_VARIABLE = "FEDWARD_SIMULATION"


class Manifest(Strict):
    """Attributes:
    sites: (folder of the site, folder of its state in this run), in the order of partition ids.
    seed: see `SimulationSettings`.
    """

    sites: tuple[tuple[Path, Path], ...]
    seed: int | None

    def place(self, partition: int) -> SitePlace:
        """The site of a simulated node.

        Raises:
            DeploymentError: if there is none.
        """
        if not 0 <= partition < len(self.sites):
            raise DeploymentError(
                f"simulated node {partition} of {len(self.sites)}", remedy="start as many nodes as sites"
            )
        root, state = self.sites[partition]
        return SitePlace(root, state)


def write_manifest(path: Path, places: tuple[SitePlace, ...], seed: int | None) -> Path:
    """Write down a run's sites; returns `path`."""
    sites = tuple((place.root.resolve(), place.state.resolve()) for place in places)
    write_atomic(path, Manifest(sites=sites, seed=seed).model_dump_json().encode())
    return path


def read_manifest(path: Path) -> Manifest:
    """Raises:
    DeploymentError: if the file is not as written.
    """
    return load_config(Manifest, path, DeploymentError)
