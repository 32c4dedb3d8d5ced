"""`fedward-site`: what a hospital does."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from client import books, officer
from client.officer import Folder, StudyFile
from common.console import JsonOption, speaking
from common.errors import SiteError

# torch, pandas and Flower are imported by the commands that need them: `connect` needs no torch.

app = typer.Typer(
    help="A hospital's side: connect data, approve studies, serve the vault, own the budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

SITE_TOML = """\
# Where to compute: "auto" takes a CUDA device where there is one, else the processor.
device = "auto"

[site]
name = "{identity.name}"
# Patients in the cohort, rounded down (e.g. to tens). It is public; the exact number stays private.
public_size = {identity.public_size}

[data]
# CSV or Parquet, one line a record, relative to this file.
file = {file}
# delimiter = ";"    # of a CSV file, if it is no comma
# decimal = ","      # of its numbers, if it is no point

# Instead of file, the result of one SELECT, which is read without the right to write. A password stands in
# password_file (chmod 600), PGPASSWORD or ~/.pgpass, never here.
# sql = "sqlite:///emr.db"    # or "postgresql+psycopg://fedward@db.hospital/emr"
# query_file = "cohort.sql"
# password_file = "keys/database.secret"

# Or, again instead of file, FHIR R4 resources: a bundle (.json), a file of one resource a line (.ndjson), or
# a folder of these.
# fhir = "export/"
# fhir_rows = "patient"    # or "encounter"
# fhir_date = 2026-01-01    # when a patient's age is counted
# [data.fhir_columns.hba1c]    # one for each of the study's columns, the label's included
# resource = "Observation"
# code = "http://loinc.org|4548-4"
# value = "last"
# unit = "%"

# Columns that are called otherwise, or measured in other units, than the study's dictionary says:
# [data.columns.chol]
# column = "CHOL_MMOL"
# unit = "mmol/L"
# multiply = 38.67

# Codes, yours = the study's:
# [data.columns.sex]
# codes = {{ M = "1", F = "0" }}

# Where the files are that a column of images or series names:
# [data.files.xray]
# at = "xrays/"    # a folder, a .tar or .tar.gz, or an .npz
#
# [data.files.stay]
# at = "labs.parquet"    # or .csv: one long table; or a folder of one file a stay
# key = "stay_id"    # what its columns are called, if not key, time, parameter and value
# time = "offset"    # since the stay's beginning
# time_unit = "minutes"    # or "hours", or "HH:MM" if nothing is said
# [data.files.stay.parameters.Glucose]    # variables that differ from the study's
# names = ["50931"]
# unit = "mmol/L"
# multiply = 18.0
"""


@app.command()
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="How the consortium calls this site, e.g. st-mary.")],
    public_size: Annotated[int, typer.Option(help="Patients in the cohort, rounded down; public.", min=1)],
    data: Annotated[str, typer.Option(help="The table's file, relative to the folder.")] = "patients.csv",
    json: JsonOption = False,
) -> None:
    """Make a site's folder with its site.toml and its secret for splitting patients."""
    from client.settings import DataSource, Identity, SiteFolder
    from client.site import make_site_keys
    from common.files import validated, write_atomic

    with speaking(json) as speaker:
        if (folder / "site.toml").exists():
            raise SiteError(
                f"{folder / 'site.toml'} exists already", remedy="edit it, or take another folder"
            )
        identity = validated(Identity, {"name": name, "public_size": public_size}, "options", SiteError)
        source = validated(DataSource, {"file": data}, "options", SiteError)
        content = SITE_TOML.format(identity=identity, file=dumps(source.file))
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(folder / "site.toml", content.encode())
        except OSError as error:
            raise SiteError(f"{folder}: {error.strerror}", remedy="take another folder") from None
        make_site_keys(SiteFolder(folder))
        speaker.say(f"{folder / 'site.toml'}: say there what your data's columns are called.")
        speaker.answer({"site": name, "folder": str(folder)})


@app.command()
def join(
    folder: Folder,
    address: Annotated[str, typer.Option(help="The coordinator's entrance, host:port.")],
    certificate: Annotated[Path, typer.Option(help="The consortium's CA certificate, from the coordinator.")],
    json: JsonOption = False,
) -> None:
    """Write the coordinator into site.toml and make the site's keys; send it the public one."""
    from client.settings import join_consortium
    from client.site import make_site_keys
    from client.supernode import create_node_key

    with speaking(json) as speaker:
        site = join_consortium(folder, address, certificate)
        make_site_keys(site)
        public = site.node_key_path.with_suffix(".pub")
        if not site.node_key_path.exists():
            create_node_key(site)
        signing = site.signing_key_path.with_suffix(".pub")
        speaker.say(f"{public}: send this public key to the coordinator, who enrols it.")
        speaker.say(f"{signing}: publish this one: it verifies the site's certificates.")
        speaker.answer(
            {
                "site": site.name,
                "address": address,
                "public_key": str(public),
                "signing_key": str(signing),
            }
        )


@app.command()
def check(folder: Folder, study: StudyFile, json: JsonOption = False) -> None:
    """Check the site's data against a study, without training. Exits with 4 if they don't fit."""
    from client.cohort import load_cohort
    from client.settings import SiteFolder
    from client.site import read_split_key
    from client.withdrawal import load_withdrawn
    from common.explain import explain_cost
    from common.study import load_study

    with speaking(json) as speaker:
        site, checked = SiteFolder(folder), load_study(study)
        key = read_split_key(site)
        cohort = load_cohort(site, checked, key)
        withdrawn = load_withdrawn(site, key).patients
        numbers = {
            "training_patients": len(cohort.train),
            "test_patients": len(cohort.test),
            "training_records": len(cohort.train.labels),
            "test_records": len(cohort.test.labels),
            "features": cohort.train.features.shape[1],
        }
        if withdrawn:
            numbers["withdrawn_listed"] = len(withdrawn)
            here = {*(cohort.train.hashes or ()), *(cohort.test.hashes or ())}
            numbers["withdrawn_of_these_here"] = len(withdrawn & here)
        size = site.file.site.public_size
        speaker.say(f"{site.data_path} fits study {checked.name} ({checked.digest[:12]}).")
        for name, value in numbers.items():
            speaker.say(f"  {name.replace('_', ' ')}: {value}")
        speaker.say(f"  one session costs a patient {explain_cost(checked, size)}")
        speaker.say("These numbers are for you; they do not leave the site.")
        patients = len(cohort.train) + len(cohort.test)
        if size > patients:
            raise SiteError(
                f"{folder / 'site.toml'}: public_size {size} is more than the patients of this study here",
                remedy="declare no more patients than there are, rounded down",
            )
        speaker.answer({"site": site.name, "study": checked.digest, **numbers})


for command in (
    officer.policy,
    officer.approve,
    officer.revoke,
    officer.withdraw,
    books.withdrawals,
    books.budget,
    books.certificate,
):
    app.command()(command)
app.add_typer(books.ledger, name="ledger")


@app.command()
def serve(
    folder: Folder,
    socket: Annotated[
        Path | None, typer.Option(help="The socket's path; default FOLDER/run/vault.sock.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run the vault until it is told to stop (SIGTERM). It opens no network connection, unless
    site.toml names a database server on another machine."""
    from client.service import serve as listen
    from client.settings import SiteFolder
    from client.site import open_vault

    with speaking(json) as speaker:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        site = SiteFolder(folder)
        path = socket or site.socket_path
        vault = open_vault(site)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        server = listen(vault, path)
        speaker.say(f"The vault of {site.name} listens on {path}.")
        speaker.answer({"site": site.name, "listening": str(path)})
        sys.stdout.flush()  # whoever waits for this line may read a pipe
        stop.wait()
        server.stop(grace=30).wait()
        vault.close()


@app.command()
def connect(
    folder: Folder,
    cold: Annotated[bool, typer.Option("--cold", help="Start a new process for every message.")] = False,
    json: JsonOption = False,
) -> None:
    """Run the SuperNode that carries messages between the coordinator and the vault (needs no data)."""
    from client.settings import SiteFolder
    from client.supernode import connect as run_supernode

    with speaking(json) as speaker:
        site = SiteFolder(folder)

        def announce() -> None:
            speaker.say(f"{site.name}: started; the coordinator sees whether it is online.")
            speaker.answer({"site": site.name, "started": True})
            sys.stdout.flush()

        run_supernode(site, announce, warm=not cold)


def main() -> None:
    """Entry point of `fedward-site`."""
    app()
