"""The cells of a table, each in a process of its own: memory is told for each, and none outlives a Ctrl-C."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import FedwardError, StudyFailed

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

    from simulations.table.cache import Cache
    from simulations.table.cell import Cell, Result

_END_SECONDS = 10.0


@dataclass(frozen=True)
class _Running:
    cell: Cell
    process: ForkServerProcess
    folder: Path


def conduct(
    cells: Sequence[Cell], cache: Cache, jobs: int = 1, told: Callable[[Cell, bool], None] = lambda *_: None
) -> list[Result]:
    """Every cell's result: from the cache, else computed and cached.

    Args:
        jobs: processes at a time.
        told: hears of every cell that is done, and whether it was known before.

    Raises:
        StudyFailed: naming the cell that failed; those that were done stay in the cache.
    """
    found = {i: result for i, cell in enumerate(cells) if (result := cache.read(cell)) is not None}
    for i in found:
        told(cells[i], True)
    waiting = [i for i in range(len(cells)) if i not in found]
    running: dict[int, _Running] = {}
    with tempfile.TemporaryDirectory(prefix="fedward-table-") as work:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    i = waiting.pop(0)
                    running[i] = _begun(cells[i], Path(work) / str(i))
                connection.wait([each.process.sentinel for each in running.values()])
                for i, each in list(running.items()):
                    if each.process.is_alive():
                        continue
                    del running[i]
                    found[i] = _ended(each)
                    cache.write(each.cell, found[i])
                    told(each.cell, False)
        finally:
            for each in running.values():
                each.process.terminate()
            for each in running.values():
                _end(each.process)
    return [found[i] for i in range(len(cells))]


def _begun(cell: Cell, folder: Path) -> _Running:
    # Forked from a server that has imported all there is to import: a new interpreter takes seconds for it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulations.table.cell"])
    folder.mkdir()
    process = context.Process(target=work, args=(cell, folder), daemon=True)
    process.start()
    return _Running(cell, process, folder)


def _ended(running: _Running) -> Result:
    from simulations.table.cell import Result

    running.process.join()
    status, name = running.process.exitcode, running.cell.name
    answer = running.folder / "answer.json"
    if status == 0 and answer.exists():
        result = Result.model_validate_json(answer.read_bytes())
        shutil.rmtree(running.folder, ignore_errors=True)
        return result
    error = running.folder / "error.json"
    if error.exists():
        message, remedy = json.loads(error.read_bytes())
        raise StudyFailed(f"{name}: {message}", remedy=remedy)
    raise StudyFailed(
        f"{name}: its process ended with {status}",
        remedy="see what it says above, and that there is memory enough, or run fewer at a time: --jobs 1",
    )


def _end(process: ForkServerProcess) -> None:
    process.join(_END_SECONDS)
    if process.is_alive():
        process.kill()
        process.join(_END_SECONDS)


def work(cell: Cell, folder: Path) -> None:
    """A process's whole work: `answer.json` in the folder, or `error.json` with message and remedy."""
    from simulations.table.cell import compute

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = compute(cell, folder)
        (folder / "answer.json").write_text(result.model_dump_json())
    except KeyboardInterrupt:
        sys.exit(130)
    except FedwardError as error:
        _tell(folder, error.message, error.remedy)
    except Exception as error:
        if os.environ.get("FEDWARD_DEBUG") == "1":
            traceback.print_exc()
        _tell(
            folder,
            f"unforeseen {type(error).__name__} (its text is withheld: it might quote data)",
            "run the command again with FEDWARD_DEBUG=1 on a trusted screen, and report the trace",
        )


def _end_with_parent() -> None:
    """Who kills the command, by force too, kills its cells."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _tell(folder: Path, message: str, remedy: str) -> None:
    with suppress(OSError):
        (folder / "error.json").write_text(json.dumps([message, remedy]))
    sys.exit(1)
