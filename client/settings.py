"""site.toml: where a hospital's data lies and whom it connects to. It names no model and no privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

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


class Files(Strict):
    """Where the files are that a column of images or series names.

    Attributes:
        at: relative to site.toml: a folder, a .tar or .tar.gz, an .npz, or a long table.
        array: the array's name in an .npz.
        max_bytes: refuse a larger single file.
    """

    at: str
    array: str = "images"
    max_bytes: Annotated[int, Field(ge=1)] = 1 << 30


class DataSource(Strict):
    """One table of records, CSV or Parquet, by the file's ending.

    Attributes:
        file: relative to site.toml.
        delimiter: of a CSV file.
        columns: dictionary name → mapping, for those that differ.
        files: dictionary name → where the files are that the column's cells name.
        max_bytes: refuse a larger file, whatever its header claims.
        max_records: refuse more records.
    """

    file: str
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    columns: dict[Name, Mapping] = Field(default_factory=dict)
    files: dict[Name, Files] = Field(default_factory=dict)
    max_bytes: Annotated[int, Field(ge=1)] = 4 << 30
    max_records: Annotated[int, Field(ge=1)] = 20_000_000


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
        return self.root / self.file.data.file

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
