"""site.toml: where a hospital's data lies and whom it connects to. It names no model and no privacy."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from client.origins import SQLITE, FhirColumn
from common.errors import SiteError
from common.fields import Finite, Name, Slug
from common.files import Strict, load_config, read_bounded, validated, write_atomic


class Mapping(Strict):
    """How one column of the data dictionary stands in the site's own table.

    Attributes:
        column: the table's column; the dictionary's name when absent.
        unit: the unit in which the table holds it. Where it differs from the dictionary's,
            `multiply` and `add` convert: dictionary value = table value * multiply + add.
        codes: the table's code → the dictionary's code.
    """

    column: str | None = None
    unit: str | None = None
    multiply: Finite = 1.0
    add: Finite = 0.0
    codes: dict[str, str] = Field(default_factory=dict)


class Parameter(Strict):
    """How one variable of a time series stands in the site's own measurements.

    Attributes:
        names: what the measurements call it, one or more; the study's name when absent.
        unit: the unit in which they are. Where it differs from the study's, `multiply` and `add` convert:
            study's value = measured value * multiply + add.
    """

    names: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ()
    unit: str | None = None
    multiply: Finite = 1.0
    add: Finite = 0.0


class Files(Strict):
    """Where the files are that a column of images or series names.

    Attributes:
        at: relative to site.toml: a folder, a .tar or .tar.gz, an .npz, or a long table.
        array: the array's name in an .npz.
        burned_in: whether DICOM images that say that identifiers may be burned into their pixels are taken.
        max_bytes: refuse a larger single file.
        key, time, parameter, value: what a series' measurements call these columns, whatever the case;
            `key`, which the column's cells name, stands in a long table only.
        time_unit: of the measurements' time since the record's beginning.
        delimiter: of a CSV file of measurements.
        parameters: the study's variable → how it stands in the measurements, for those that differ.
    """

    at: str
    array: str = "images"
    burned_in: Literal["refuse", "accept"] = "refuse"
    max_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    key: str = "key"
    time: str = "time"
    parameter: str = "parameter"
    value: str = "value"
    time_unit: Literal["hours", "minutes", "HH:MM"] = "HH:MM"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    parameters: dict[str, Parameter] = Field(default_factory=dict)


@dataclass(frozen=True)
class Where:
    """Where a column's files are.

    Attributes:
        path: a folder or a file; may be absent.
        files: the site's setting.
    """

    path: Path
    files: Files


class DataSource(Strict):
    """One table of records: a CSV or Parquet file by its ending, a query's result, or FHIR resources.

    Attributes:
        file: relative to site.toml.
        delimiter: of a CSV file.
        decimal: what stands before the decimals of its numbers. With a comma, a number with a point is
            refused: 1.500 could be meant as 1500.
        sql: a database, `sqlite:///FILE` (relative to site.toml) or `postgresql+psycopg://HOST/NAME`, without
            a password.
        query, query_file: the one SELECT whose result is the table; a file is relative to site.toml.
        password_file: holds a server's password alone; else PGPASSWORD or ~/.pgpass have it.
        max_seconds: end a query that takes longer.
        fhir: a bundle (.json), a file of one resource a line (.ndjson), or a folder of these.
        fhir_rows: what a row of the table is.
        fhir_date: when a Patient's age is counted; the encounter's beginning where absent.
        fhir_columns: the table's column → how it is made. `patient_id` and, of encounters, `encounter_id`
            are there in any case.
        dangling: what to do about resources of a patient or encounter who isn't there.
        columns: dictionary name → mapping, for those that differ.
        files: dictionary name → where the files are that the column's cells name.
        max_bytes: refuse a larger file, whatever its header claims, a larger result, and images, series,
            texts or molecules that would come to more; training takes several times as much.
        max_records: refuse more records.
    """

    file: str | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    decimal: Literal[".", ","] = "."
    sql: str | None = None
    query: Annotated[str, Field(max_length=100_000)] | None = None
    query_file: str | None = None
    password_file: str | None = None
    max_seconds: Annotated[int, Field(ge=1, le=86_400)] = 3600
    fhir: str | None = None
    fhir_rows: Literal["patient", "encounter"] = "patient"
    fhir_date: date | None = None
    fhir_columns: dict[Name, FhirColumn] = Field(default_factory=dict)
    dangling: Literal["refuse", "skip"] = "refuse"
    columns: dict[Name, Mapping] = Field(default_factory=dict)
    files: dict[Name, Files] = Field(default_factory=dict)
    max_bytes: Annotated[int, Field(ge=1)] = 4 << 30
    max_records: Annotated[int, Field(ge=1)] = 20_000_000

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(each is not None for each in (self.file, self.sql, self.fhir)) != 1:
            raise ValueError("give one of file, sql and fhir: where the records are")
        if (self.query is not None) + (self.query_file is not None) != (self.sql is not None):
            raise ValueError("give query or query_file with sql, and only then")
        if self.decimal != "." and (self.file is None or self.file.lower().endswith((".parquet", ".pq"))):
            raise ValueError("decimal belongs to a CSV file; elsewhere numbers are no texts")
        if self.password_file is not None and self.sql is None:
            raise ValueError("password_file belongs to sql")
        if self.fhir is None and (self.fhir_columns or self.fhir_date or self.fhir_rows != "patient"):
            raise ValueError("fhir_columns, fhir_rows and fhir_date belong to fhir")
        if {"patient_id", "encounter_id"} & {*self.fhir_columns}:
            raise ValueError("fhir_columns: patient_id and encounter_id are made anyway; leave them out")
        return self


class Identity(Strict):
    """Attributes:
    name: how the consortium calls the site.
    public_size: patients in the cohort, declared and public: rounded down, e.g. to tens. It fixes
        the weight in aggregation, the sampling rate and the divisor; the exact number stays private.
    """

    name: Slug
    public_size: Annotated[int, Field(ge=1)]


class CoordinatorAddress(Strict):
    """Attributes:
    address: host:port of the coordinator's TLS entrance.
    certificate: the consortium's CA certificate (PEM), relative to site.toml.
    """

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-]+:[0-9]{1,5}$")]
    certificate: str = "ca.crt"


class SiteFile(Strict):
    """The content of site.toml.

    Attributes:
        device: where to compute (client/device): `auto` is CUDA where there is one.
        step_memory_mib: what activations and gradients of a training step may take up; a larger step is
            done in pieces.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    step_memory_mib: Annotated[int, Field(ge=16)] = 1024
    site: Identity
    data: DataSource
    coordinator: CoordinatorAddress | None = None


class SiteFolder:
    """A hospital's folder and the names of what lies in it.

    Args:
        root: holds site.toml and the data.
        state: holds everything else: policy, ledger, keys. `root`, but for simulations, which leave
            the folder of a site as they find it.

    Raises:
        SiteError: if it has no readable site.toml.
    """

    def __init__(self, root: Path, state: Path | None = None) -> None:
        self.root = root
        self.state = state or root
        self.file = load_config(SiteFile, root / "site.toml", SiteError)

    @property
    def name(self) -> str:
        return self.file.site.name

    @property
    def data_path(self) -> Path:
        """The data's file or folder; site.toml, which names it, where a server has the data."""
        data = self.file.data
        sqlite = data.sql.removeprefix(SQLITE) if data.sql and data.sql.startswith(SQLITE) else None
        return self.root / (data.file or data.fhir or sqlite or "site.toml")

    @property
    def policy_path(self) -> Path:
        return self.state / "policy.toml"

    @property
    def approved(self) -> Path:
        """Folder of approved studies, `DIGEST.json` each, in canonical form."""
        return self.state / "approved"

    @property
    def ledger_path(self) -> Path:
        return self.state / "ledger" / "ledger.jsonl"

    @property
    def replies(self) -> Path:
        """Folder of replies that were committed, so that asking twice spends once."""
        return self.state / "ledger" / "replies"

    @property
    def head_path(self) -> Path:
        """The ledger's last head, beside it: whoever cuts the ledger's end must find this one, too."""
        return self.state / "ledger" / "head"

    @property
    def withdrawn_path(self) -> Path:
        return self.state / "withdrawn.txt"

    @property
    def withdrawn_lists(self) -> Path:
        """Folder of every withdrawal list that was in force, `DIGEST.txt` each."""
        return self.state / "ledger" / "withdrawn"

    @property
    def certificates(self) -> Path:
        """Folder of certificates, `SESSION.jws` each."""
        return self.state / "certificates"

    @property
    def signing_key_path(self) -> Path:
        """Signs ledger entries and certificates; the public one lies beside it as site.pub."""
        return self.state / "keys" / "site.key"

    @property
    def split_key_path(self) -> Path:
        return self.state / "keys" / "split.key"

    @property
    def node_key_path(self) -> Path:
        return self.state / "keys" / "node.key"

    @property
    def socket_path(self) -> Path:
        return self.state / "run" / "vault.sock"


def join_consortium(root: Path, address: str, certificate: Path) -> SiteFolder:
    """Write a coordinator into a site's folder: its CA certificate as ca.crt, its address in site.toml.

    Raises:
        SiteError: if the site has a coordinator already, or a file or the address is wrong.
    """
    site = SiteFolder(root)
    path = root / "site.toml"
    if site.file.coordinator is not None:
        raise SiteError(f"{path}: [coordinator] is there already", remedy="edit it there")
    wanted = validated(CoordinatorAddress, {"address": address}, "--address", SiteError)
    authority = read_bounded(certificate, SiteError)
    if b"-----BEGIN CERTIFICATE-----" not in authority:
        raise SiteError(f"{certificate}: not a PEM certificate", remedy="ask the coordinator for its ca.crt")
    table = f'\n[coordinator]\naddress = "{wanted.address}"\ncertificate = "{wanted.certificate}"\n'
    try:
        write_atomic(root / wanted.certificate, authority, mode=0o644)
        write_atomic(path, read_bounded(path, SiteError) + table.encode())
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", remedy="check its permissions") from None
    return SiteFolder(root)
