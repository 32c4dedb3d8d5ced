"""Many sites on one machine: the same ServerApp, ClientApp and vaults, in one process or on Ray."""

from simulations.engine.simulation import Simulation, SimulationSettings, new_session_id, simulate

__all__ = ["Simulation", "SimulationSettings", "new_session_id", "simulate"]
