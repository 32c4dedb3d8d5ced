"""How every command speaks: text for people, `--json` for programs, truthful exit codes.

A command opens `speaking(json)` and hands its result to `answer`. On a terminal there are colours and
progress; in a pipe there is only the answer. A `FedwardError` ends as one clear message on standard
error (or one JSON object on standard output) and its own exit status; anything unforeseen is named by
its type only, because its text might quote data.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from common.errors import FedwardError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

PIPE_WIDTH = 200
INTERNAL_ERROR_STATUS = 70  # EX_SOFTWARE of sysexits.h


class Speaker:
    """Writes one command's output, as text or as one JSON object."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # A pipe has no width: a table must not be cut to the 80 columns that rich assumes there.
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        self.out = RichConsole(highlight=False, soft_wrap=True, width=width)
        self.err = RichConsole(stderr=True, highlight=False, soft_wrap=True)

    @property
    def live(self) -> bool:
        """Whether progress may be drawn: a person watches, and no program reads."""
        return self.err.is_terminal and not self.as_json

    def say(self, text: str) -> None:
        """Show a line to a person; programs don't get it."""
        if not self.as_json:
            self.out.print(text, markup=False)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table to a person; the first column is left-aligned, the others right-aligned."""
        if self.as_json:
            return
        self.out.print(title, markup=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.out.print(table, soft_wrap=False)

    def answer(self, value: Mapping[str, Any]) -> None:
        """Print the command's result for programs; people have been told by `say` and `table`."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str) + "\n")

    def fail(self, error: FedwardError) -> None:
        if self.as_json:
            self.answer({"error": error.code, "message": error.message, "remedy": error.remedy})
            return
        self.err.print(f"error: {error.message}", style="red", markup=False)
        if error.remedy:
            self.err.print(f"remedy: {error.remedy}", markup=False)


@contextmanager
def speaking(as_json: bool = False) -> Iterator[Speaker]:
    """Run a command's body; end with its exit status.

    Raises:
        typer.Exit: with the error's `exit_status` after a `FedwardError`, 130 after Ctrl-C, 70 after
            anything unforeseen (`FEDWARD_DEBUG=1` lets that one through with its trace).
    """
    speaker = Speaker(as_json)
    try:
        yield speaker
    except FedwardError as error:
        speaker.fail(error)
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        speaker.err.print("interrupted", style="red")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if os.environ.get("FEDWARD_DEBUG") == "1":
            raise
        unforeseen = FedwardError(
            f"unforeseen {type(error).__name__} (its text is withheld: it might quote data)",
            remedy="run the command again with FEDWARD_DEBUG=1 on a trusted screen, and report the trace",
        )
        speaker.fail(unforeseen)
        raise typer.Exit(INTERNAL_ERROR_STATUS) from None
