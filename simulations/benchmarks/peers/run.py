"""Rounds of another framework, run by the interpreter that has it: `python -I run.py NAME WORK FOLDER`.

It imports nothing of fedward. One line of JSON tells of the run as `simulations.benchmarks.rounds` does, and
FOLDER/weights.npz holds what it ended with. Processor time and memory are those of the first process alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Told = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """Attributes:
    sites: features float32 [patients, inputs] and labels [patients] of each.
    orders: [round][site], who comes in which batch.
    noise: each site's noise multiplier; empty without privacy.
    parameters: of linear layers with a ReLU between them: weight and bias in turn.
    """

    sites: tuple[tuple[np.ndarray, np.ndarray], ...]
    orders: tuple[tuple[np.ndarray, ...], ...]
    test: tuple[np.ndarray, np.ndarray]
    batch: int
    rate: float
    noise: tuple[float, ...]
    clipping_norm: float
    parameters: Arrays

    @classmethod
    def read(cls, path: Path) -> Work:
        with np.load(path, allow_pickle=False) as found:
            ends = found["offsets"][1:-1]
            features, labels = (np.split(found[name], ends) for name in ("features", "labels"))
            return cls(
                sites=tuple(zip(features, labels, strict=True)),
                orders=tuple(tuple(np.split(order, ends)) for order in found["orders"]),
                test=(found["test_features"], found["test_labels"]),
                batch=int(found["batch"]),
                rate=float(found["rate"]),
                noise=tuple(found["noise"].tolist()),
                clipping_norm=float(found["clipping_norm"]),
                parameters={
                    name.removeprefix("parameter:"): found[name]
                    for name in found.files
                    if name.startswith("parameter:")
                },
            )


def fedjax(work: Work, told: Told) -> Arrays:
    """Google's FedJAX (0.0.17): its federated averaging, JAX compiled on the processor.

    It fills a last batch that isn't full from the first records, and so ends with somewhat other weights.
    """
    import jax

    jax.tree_map = jax.tree_util.tree_map  # which today's JAX has no more
    import fedjax
    import jax.numpy as jnp
    from fedjax.algorithms import fed_avg

    def outputs(parameters: Any, x: Any) -> Any:
        for place in range(0, len(parameters), 2):
            x = (jax.nn.relu(x) if place else x) @ parameters[place].T + parameters[place + 1]
        return x

    def loss(parameters: Any, batch: Mapping[str, Any], _: Any = None) -> Any:
        found = jax.nn.log_softmax(outputs(parameters, batch["x"]))
        return -jnp.take_along_axis(found, batch["y"][:, None], 1).mean()

    @jax.jit
    def evaluated(parameters: Any) -> Any:
        found = jax.nn.log_softmax(outputs(parameters, features))
        right = found.argmax(1) == labels
        return -jnp.take_along_axis(found, labels[:, None], 1).mean(), right.mean()

    features, labels = map(jnp.asarray, work.test)
    algorithm = fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(work.rate),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(
            batch_size=work.batch, num_epochs=1, drop_remainder=False, skip_shuffle=True
        ),
    )
    state, key = algorithm.init([jnp.asarray(value) for value in work.parameters.values()]), jax.random.key(0)
    for orders in work.orders:
        clients = []
        for number, ((x, y), order) in enumerate(zip(work.sites, orders, strict=True)):
            data = fedjax.ClientDataset({"x": x[order], "y": y[order]})
            clients.append((str(number), data, key))
        state, _ = algorithm.apply(state, clients)
        for value in evaluated(state.params):
            float(value)
        told()
    return dict(zip(work.parameters, map(np.asarray, state.params), strict=True))


def network_of(parameters: Arrays) -> Any:
    """torch's, with these parameters."""
    import torch
    from torch import nn

    values = [torch.from_numpy(value.copy()) for value in parameters.values()]
    layers: list[nn.Module] = []
    for weight, bias in zip(values[::2], values[1::2], strict=True):
        layers += [nn.ReLU()] if layers else []
        layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        layers[-1].load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(*layers)


def pfl(work: Work, told: Told) -> Arrays:
    """Apple's pfl-research (0.6): its simulated backend in one process, on torch."""
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.callback.central_evaluation import CentralEvaluationCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(1)
    network = network_of(work.parameters)

    def loss(self: nn.Module, x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> torch.Tensor:
        self.eval() if eval else self.train()
        return functional.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self: nn.Module, x: torch.Tensor, y: torch.Tensor, eval: bool = True) -> dict[str, Any]:
        self.eval() if eval else self.train()
        found = self(x)
        entropy = functional.cross_entropy(found, y, reduction="sum").item()
        right = (found.argmax(1) == y).sum().item()
        return {"loss": Weighted(entropy, len(x)), "accuracy": Weighted(right, len(x))}

    network.loss, network.metrics = types.MethodType(loss, network), types.MethodType(metrics, network)
    data = [tuple(map(torch.from_numpy, each)) for each in work.sites]
    seen = [0] * len(data)

    def user(site: int) -> Any:
        order = torch.from_numpy(work.orders[seen[site]][site])
        seen[site] += 1
        return PyTorchTensorDataset([each[order] for each in data[site]], user_id=site)

    class Told(TrainingProcessCallback):
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            told()
            return False, Metrics()

    all_test = NNEvalHyperParams(local_batch_size=None)
    test = Dataset(tuple(map(torch.from_numpy, work.test)), eval_kwargs={"eval": True})
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=len(work.orders),
            evaluation_frequency=10**9,
            train_cohort_size=len(data),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(len(data))))),
            val_data=None,
            postprocessors=[WeightByDatapoints()],
        ),
        model=PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=work.rate, local_num_epochs=1, local_batch_size=work.batch
        ),
        model_eval_params=all_test,
        callbacks=[CentralEvaluationCallback(test, model_eval_params=all_test), Told()],
    )
    ended = [value.detach().numpy() for value in network.parameters()]
    return dict(zip(work.parameters, ended, strict=True))


def flower(work: Work, told: Told) -> Arrays:
    """Flower's own simulation on Ray, an app as its examples have it; with privacy, its example of Opacus.

    Ray listens on all interfaces meanwhile.
    """
    import torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    shared = Path(sys.argv[2])
    client_app, server_app, ended = ClientApp(), ServerApp(), list[Any]()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        # This function comes to Ray's processes by value, and would read the file again for each message
        held = vars(sys).setdefault("work", {})
        ours = held.get("work") or held.setdefault("work", Work.read(shared))
        site = int(context.node_config["partition-id"])
        model = network_of(ours.parameters)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        _epoch(model, ours, site, int(message.content["config"]["server-round"]))
        count = MetricRecord({"num-examples": len(ours.sites[site][1])})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": count})
        return Message(content, reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        def evaluated(number: int, arrays: ArrayRecord) -> MetricRecord:
            model = network_of(work.parameters)
            model.load_state_dict(arrays.to_torch_state_dict())
            x, y = map(torch.from_numpy, work.test)
            with torch.no_grad():
                outputs = model(x)
            loss = torch.nn.functional.cross_entropy(outputs, y).item()
            right = (outputs.argmax(1) == y).float().mean().item()
            if number:
                told()
            return MetricRecord({"loss": loss, "accuracy": right})

        count = len(work.sites)
        result = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count).start(
            grid=grid,
            initial_arrays=ArrayRecord(network_of(work.parameters).state_dict()),
            num_rounds=len(work.orders),
            evaluate_fn=evaluated,
        )
        ended.append(result.arrays.to_torch_state_dict())

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_supernodes=len(work.sites), backend_config=resources)
    return dict(zip(work.parameters, (value.numpy() for value in ended[0].values()), strict=True))


def _epoch(model: Any, work: Work, site: int, number: int) -> None:
    """As everybody writes it."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    data = TensorDataset(*map(torch.from_numpy, work.sites[site]))
    optimizer, wrapped = torch.optim.SGD(model.parameters(), lr=work.rate), model
    loader: Any = DataLoader(data, batch_size=work.batch, sampler=work.orders[number - 1][site].tolist())
    if work.noise:
        import warnings

        from opacus import PrivacyEngine

        warnings.simplefilter("ignore")
        wrapped, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
            module=model.train(),
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=work.batch),
            noise_multiplier=work.noise[site],
            max_grad_norm=work.clipping_norm,
        )
    wrapped.train()
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()


PEERS: dict[str, Callable[[Work, Told], Arrays]] = {"fedjax": fedjax, "pfl": pfl, "flower": flower}
PRIVATE = ("flower",)  # of them


def main(name: str, work_file: str, folder: str) -> None:
    """All rounds, the global model evaluated after each on all test patients together."""
    work, ends, processor = Work.read(Path(work_file)), list[float](), list[float]()
    began = time.perf_counter()

    def told() -> None:
        ends.append(time.perf_counter() - began)
        processor.append(time.process_time())

    ended = PEERS[name](work, told)
    total = time.perf_counter() - began
    Path(folder).mkdir(parents=True, exist_ok=True)
    np.savez(Path(folder) / "weights.npz", **ended)  # type: ignore[arg-type]
    rounds = len(ends) - 1
    line = {
        "total": total,
        "first": ends[0],
        "per_round": (ends[-1] - ends[0]) / rounds,
        "processor": (processor[-1] - processor[0]) / rounds,
        "peak": _peak_bytes(),
    }
    sys.stdout.write(json.dumps(line) + "\n")


def _peak_bytes() -> int:
    """0 where the system doesn't tell; its accounts of a process begin with the parent's memory."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
