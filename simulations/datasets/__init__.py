"""Public data sets: fetched with their checksums, prepared as hospitals."""

from simulations.datasets.fetch import fetch
from simulations.datasets.prepare import prepare
from simulations.datasets.registry import Dataset, datasets

__all__ = ["Dataset", "datasets", "fetch", "prepare"]
