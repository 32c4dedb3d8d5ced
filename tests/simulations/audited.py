"""Small private studies of each kind of model, which the audit's tests and tables are about."""

from __future__ import annotations

from typing import Any

import small

from common.study import Study

VARIABLES = [{"name": name, "unit": "1", "range": [0, 10]} for name in ("HR", "RR")]
SERIES = {"kind": "series", "name": "stay", "hours": 4, "step_hours": 1, "variables": VARIABLES}
PARAMETERS: dict[str, dict[str, Any]] = {"cnn": {"channels": [8]}, "gru": {"hidden": 16}}
MODELS = ("logistic-regression", "mlp", *PARAMETERS)


def image(side: int) -> dict[str, Any]:
    """A column of grey pictures."""
    return {"kind": "image", "name": "scan", "size": [side, side]}


def study(name: str, *, side: int = 8, rounds: int = 40, sample_rate: float = 0.25, **privacy: Any) -> Study:
    """One step in each round, at ε = 4 if nothing else is said.

    Args:
        side: of a CNN's pictures, in pixels.
    """
    changes: dict[str, Any] = {}
    if name in PARAMETERS:
        data = small.study().model_dump(mode="json")["data"]
        changes["data"] = data | {"columns": [image(side) if name == "cnn" else SERIES]}
    wanted = {"mode": "patient-dp", "epsilon": 4.0, "delta": 1e-4, "clipping_norm": 1.0}
    return small.study(
        **changes,
        model={"name": name, "parameters": PARAMETERS.get(name, {})},
        algorithm={"rounds": rounds},
        training={"local_steps": 1, "sample_rate": sample_rate},
        privacy=wanted | privacy,
    )


# --- the table of bounds in simulations/audit/README.md; run with PYTHONPATH=tests:.


def main() -> None:
    """Audit a model at several ε, and print a table's rows: lower bounds at either site."""
    import argparse
    import logging

    from simulations.audit.run import FULL, audit

    logging.getLogger("fedward").setLevel(logging.CRITICAL)  # vaults refuse the attacks, and say so
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--model", choices=MODELS, default=MODELS[0])
    options.add_argument("--side", type=int, default=8)
    options.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    given = options.parse_args()
    print("| model | claimed | by trade-off | by one run | by the noise | final model | s |")
    print("|---|---|---|---|---|---|---|")
    for epsilon in given.epsilon:
        asked = study(given.model, side=given.side, rounds=50, sample_rate=0.1, epsilon=epsilon)
        found = audit(asked, 2000, size=FULL)
        name = f"CNN, {given.side}×{given.side}" if given.model == "cnn" else given.model
        parts = [
            ", ".join(f"{getattr(bound, field):.2f}" for bound in found.bounds)
            for field in ("by_trade_off", "one_run", "by_noise")
        ]
        last = f"{found.final_model.at_least:.2f} ({found.final_model.unprotected:.2f})"
        sound = "" if found.sound else ", NOT SOUND"
        print(
            f"| {name} | {epsilon:g} | {' | '.join(parts)} | {last} | {found.seconds:.0f}{sound} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
