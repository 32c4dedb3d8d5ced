"""`fedward-audit`: what an outsider checks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.console import JsonOption, speaking
from common.errors import FedwardError
from server.store import Store
from simulations.audit.recompute import recompute as opinions_of

app = typer.Typer(
    help="An outsider's side: recompute what was promised.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _verbs() -> None:
    """More verbs follow; Typer drops the verb's name while there is one."""


@app.command()
def recompute(
    store: Annotated[Path, typer.Argument(help="Folder with store.db: RUN/store or COORDINATOR/store.")],
    session: Annotated[str | None, typer.Argument(help="Its id; the latest if absent.")] = None,
    json: JsonOption = False,
) -> None:
    """Recompute every site's ε from the events that it sent, with a second accountant.

    Exits with 1 if the accountants disagree by more than 2 %, or find more than the study promised.
    """
    with speaking(json) as speaker:
        if not (store / "store.db").exists():
            raise FedwardError(f"{store}: no store.db in it", remedy="give RUN/store or COORDINATOR/store")
        opened = Store(store)
        known = opened.sessions()
        if not known:
            raise FedwardError(f"{store}: no session in it", remedy="run a study first")
        chosen = opened.session(session) if session else known[-1]
        found = opinions_of(opened, chosen)
        rows = [
            [o.site, o.patients, f"{o.claimed:g}", f"{o.fedward:.4f}", f"{o.second:.4f}", _word(o.sound)]
            for o in found
        ]
        header = ["site", "patients", "ε promised", "ε (fedward)", "ε (Google PLD)", "holds"]
        speaker.table(f"{chosen.id}, δ = {chosen.study.privacy.delta:g}", header, rows)
        if any(a.exact for r in opened.rounds(chosen.id) for a in r.answers):
            speaker.say("Metrics were exact, on records declared public: test patients have no promise.")
        speaker.say("Trusted, not proven: that each site added the noise that its events say.")
        speaker.answer({"session": chosen.id, "opinions": [{**asdict(o), "sound": o.sound} for o in found]})
        if not found or not all(o.sound for o in found):
            raise FedwardError(
                "the privacy promise does not hold by these events", remedy="see the rows that say NO"
            )


def _word(sound: bool) -> str:
    return "yes" if sound else "NO"


def main() -> None:
    """Entry point of `fedward-audit`."""
    app()
