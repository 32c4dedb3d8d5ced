"""Many sites on one machine: the same ServerApp, ClientApp and vaults, in one process or on Ray."""

from simulations.engine.simulation import Simulation, SimulationSettings, simulate

__all__ = ["Simulation", "SimulationSettings", "simulate"]
