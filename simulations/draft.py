"""The draft of a study and its data dictionary, from a CSV file.

A draft says what is in the file: codes, and how far numbers reach. So it is as private as the file, until a
person has put in its place what the literature says.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from client.settings import DataSource
from client.sources.delimited import read_csv
from common.errors import DataError, StudyError
from common.features import normal_code
from common.schema import DECIMAL_COMMA, FINITE_NUMBER
from common.study import Study, parse_study

ABSENT = ("NA", "N/A", "n/a", "na", "NULL", "null", "None", "none", "?", ".", "-", "k.A.", "k. A.", "n.d.")
"""What files say for a missing value, besides nothing and NaN."""

MOST_CODES, MOST_CLASSES = 20, 10
_NO = ("0", "no", "nein", "non", "false", "falsch", "faux", "negative", "negativ", "négatif", "n", "f")
_SPELT = str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ß": "ss", "œ": "oe", "µ": "u"}
)
_MOST_STRANGE = 0.2  # of a column's cells: else its numbers are chance
FEW_NUMBERS = 5  # whole numbers of which there are no more are taken for codes
_KEYS = ("patient_id", "patient", "patientid", "subject_id", "subject", "person_id", "pid", "mrn", "id")
_LABELS = ("label", "outcome", "target", "diagnosis", "class", "y")
_MOST_RECORDS = 100

WARNING = """\
# A DRAFT, MADE FROM THE FILE {file}. Before it is more than a simulation of data that is public anyway:
#
# - Ranges were taken from the file's own values, rounded outwards, and codes from its own cells. THEY TELL OF
#   ITS PATIENTS. Put in their place what the literature or the device's handbook says: a study is public, and
#   its privacy budget counts only what is trained, not what was looked up in the data before.
# - Give every "TODO": units (UCUM; "1" means none), what columns and codes mean.
# - Choose epsilon, delta (well below 1 / patients), model and training without looking at private data.
"""


@dataclass(frozen=True)
class Draft:
    """Attributes:
    text: the study file.
    study: what it says.
    left_out: columns of the file that the study doesn't use, and why.
    frame: the file's records that have a label, under the study's names.
    names: the study's name of a column → the file's, where they differ.
    delimiter: of the file.
    """

    text: str
    study: Study
    left_out: dict[str, str]
    frame: pd.DataFrame
    names: dict[str, str]
    delimiter: str


def draft(file: Path, name: str, label: str | None = None, patient: str | None = None) -> Draft:
    """Draft a study of a CSV file, one line a record.

    Args:
        name: of the study.
        label: the column that is learnt, and `patient` the one that says whose record it is; guessed by their
            names if absent.

    Raises:
        DataError: if the file is no sound CSV, or lacks what a study needs.
        StudyError: if a column that is named isn't there, or none could be guessed.
    """
    raw, delimiter = _read(file)
    key = _chosen(raw, patient, _KEYS, "--patient")
    target = _chosen(raw, label, _LABELS, "--label", key)
    names = _names([str(column) for column in raw.columns])
    frame = raw.rename(columns={old: new for new, old in names.items()})
    key, target = (next(new for new, old in names.items() if old == each) for each in (key, target))
    frame = frame[~_missing(frame[target]) & ~_missing(frame[key])].reset_index(drop=True)
    if frame.empty:
        raise DataError(f"{file}: no record has a label and a patient", remedy="name other columns")
    parts, left_out = [], {}
    for column in frame.columns:
        if column in (key, target):
            continue
        told = _column(column, frame[column])
        if isinstance(told, str):
            left_out[names[column]] = told
        else:
            parts.append(told)
    if not parts:
        raise DataError(f"{file}: no column is left to learn from", remedy="give numbers, or codes")
    sizes = frame[key].value_counts()
    lines = [
        WARNING.format(file=_printable(file.name)),
        *_head(name),
        *_data(key, parts),
        *_label(target, frame[target]),
    ]
    lines += _rest(_task(frame[target]), len(sizes), int(sizes.max()))
    lines += [f"# Left out: {_printable(column)} ({why})" for column, why in left_out.items()]
    text = "\n".join(lines) + "\n"
    study = parse_study(text.encode(), "the draft")
    used = {key, target, *(column.name for column in study.data.columns)}
    renamed = {new: old for new, old in names.items() if new != old and new in used}
    return Draft(text, study, left_out, frame, renamed, delimiter)


def _read(file: Path) -> tuple[pd.DataFrame, str]:
    """All cells as text, trimmed; and the delimiter."""
    try:
        with file.open("rb") as opened:
            first = opened.readline().decode("utf-8-sig", errors="replace")
            delimiter = max(",;\t", key=first.count)
            source = DataSource(file=file.name, delimiter=delimiter)
            opened.seek(0)
            rows, _, _ = read_csv(opened, str(file), source)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}", remedy="check the path and its permissions") from None
    frame: pd.DataFrame = rows.to_pandas().astype(str)
    return pd.DataFrame({name: frame[name].str.strip() for name in frame.columns}), delimiter


def _chosen(
    frame: pd.DataFrame, wanted: str | None, usual: Sequence[str], option: str, taken: str = ""
) -> str:
    """The column that is named, or else is called as usual."""
    if wanted is not None:
        if wanted not in frame.columns or wanted == taken:
            raise StudyError(
                f"{option} {wanted}: the file has no such column, or it is taken", remedy="name another"
            )
        return wanted
    small = {str(column).lower(): str(column) for column in frame.columns if column != taken}
    for name in usual:
        if name in small:
            return small[name]
    remedy = f"name it: {option} COLUMN"
    if option == "--patient":
        remedy += "; if every record is another patient, add a column that numbers them"
    raise StudyError(f"no column is called {', '.join(usual[:4])} or the like", remedy=remedy)


def _names(columns: Sequence[str]) -> dict[str, str]:
    """The study's name of each column → the file's."""
    found: dict[str, str] = {}
    for column in columns:
        plain = re.sub(r"[^A-Za-z0-9]+", "_", _plain_letters(column)).strip("_")[:60]
        plain = plain if re.match(r"[A-Za-z]", plain) else f"column_{plain}".rstrip("_")
        name, number = plain, 1
        while name in found or (name != column and name in columns):
            number += 1
            name = f"{plain}_{number}"
        found[name if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", column) else column] = column
    return found


def _plain_letters(text: str) -> str:
    """Größe as Groesse, créatinine as creatinine."""
    spelt = unicodedata.normalize("NFC", text).translate(_SPELT)
    return "".join(c for c in unicodedata.normalize("NFKD", spelt) if not unicodedata.combining(c))


def _missing(values: pd.Series) -> pd.Series:
    return values.str.lower().isin(["", "nan"]) | values.isin(ABSENT)


def _task(values: pd.Series) -> str:
    known = _codes(values)
    if len(known) == 2:
        return "binary"
    return "regression" if _numeric(values) and len(known) > MOST_CLASSES else "multi-class"


def _codes(values: pd.Series) -> list[str]:
    """The distinct codes in normal form: numbers rising, then text."""
    known = {normal_code(each) for each in values.unique()}
    numbers = {code: float(code) for code in known if re.fullmatch(FINITE_NUMBER, code)}
    return sorted(numbers, key=numbers.__getitem__) + sorted(known - set(numbers))


def _numeric(values: pd.Series) -> bool:
    return bool(len(values)) and bool(values.str.fullmatch(FINITE_NUMBER).all())


def _reach(values: pd.Series) -> tuple[float, float]:
    """An interval around the values, rounded outwards to a tenth of its width or so."""
    numbers = values.astype(float)
    low, high = float(numbers.min()), float(numbers.max())
    if low == high:
        return low - 1.0, high + 1.0
    step = 10.0 ** math.floor(math.log10(high - low))
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return float(f"{low:.12g}"), float(f"{high:.12g}")


def _column(name: str, values: pd.Series) -> list[str] | str:
    """A column's table of the study file, or why it is left out."""
    absent = _missing(values)
    known = values[~absent]
    codes = _codes(known)
    if len(codes) < 2:
        return "it has one value only" if codes else "it is empty"
    numeric = _numeric(known)
    whole = all(re.fullmatch(r"[+-]?[0-9]+", code) for code in codes)
    lines = ["[[data.columns]]"]
    if numeric and not (whole and len(codes) <= FEW_NUMBERS):
        lines += ['kind = "numeric"', f"name = {_text(name)}", 'description = "TODO"', 'unit = "1" # TODO']
        lines += [f"range = {list(_reach(known))} # TODO: from the literature"]
    elif len(codes) <= MOST_CODES and all(len(code) <= 64 for code in codes):
        meanings = ", ".join(f"{_text(code)} = {_text(code)}" for code in codes)
        lines += ['kind = "categorical"', f"name = {_text(name)}", 'description = "TODO"']
        lines += [f"codes = {{ {meanings} }} # TODO: what they mean"]
    else:
        return _unusable(known)
    if absent.any():
        lines.append('missing = "indicator"')
        said = sorted({*values[absent].unique()} & {*ABSENT})
        lines += [f"missing_codes = {json.dumps(said)}"] if said else []
    return [*lines, ""]


def _unusable(known: pd.Series) -> str:
    """Why a column of neither numbers nor few codes is left out; never what a cell holds."""
    commas = known.str.fullmatch(DECIMAL_COMMA)
    strange = ~known.str.fullmatch(FINITE_NUMBER) & ~commas
    if strange.mean() <= _MOST_STRANGE and commas.any():
        return f"decimal commas in {int(commas.sum())} cells: export numbers with a point"
    if strange.mean() <= _MOST_STRANGE:
        return f"numbers, but for {int(strange.sum())} cells: empty these in the file, or mend them"
    return f'more than {MOST_CODES} codes: dates, identifiers, or a text, which kind = "text" is for'


def _text(value: str) -> str:
    """A TOML string; JSON's is one, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _head(name: str) -> Iterator[str]:
    yield from ("format = 1", f"name = {_text(name)}", f"title = {_text('TODO: ' + name)}", "")


def _data(key: str, parts: Sequence[Sequence[str]]) -> Iterator[str]:
    yield from ("[data]", f"patient_key = {_text(key)}", "")
    for part in parts:
        yield from part


def _label(name: str, values: pd.Series) -> Iterator[str]:
    yield from ("[data.label]", f"column = {_text(name)}", 'description = "TODO"')
    if _task(values) == "regression":
        yield f"range = {list(_reach(values))} # TODO: from the literature; predictions are kept within it"
        yield from ('unit = "1" # TODO', "")
        return
    codes = _codes(values)
    if len(codes) < 2:
        raise DataError("the label has one value only", remedy="name another column: --label COLUMN")
    if len(codes) > MOST_CLASSES:
        raise DataError(
            f"the label has more than {MOST_CLASSES} classes", remedy="name another column: --label COLUMN"
        )
    if len(codes) == 2 and codes[1].lower() in _NO and codes[0].lower() not in _NO:
        codes.reverse()  # so that yes is the positive one
    yield "classes = ["
    for code in codes:
        yield f"    {{ name = {_text(code)}, codes = [{_text(code)}] }},"
    yield f"]{' # the second one is the positive one' if len(codes) == 2 else ''}"
    yield ""


def _rest(task: str, patients: int, records: int) -> Iterator[str]:
    """Model, training and privacy: a linear model that is sure to run, and learns something."""
    delta = 10.0 ** -max(3, math.ceil(math.log10(patients)))
    most = min(records, _MOST_RECORDS)
    yield from ("[model]", 'name = "logistic-regression" # or "mlp"', "")
    yield from ("[objective]", f"task = {_text(task)}", "")
    yield from ("[algorithm]", "rounds = 20", "")
    yield from (
        "[training]",
        "local_steps = 1",
        "sample_rate = 1.0",
        f"max_records_per_patient = {most} # TODO",
    )
    rate = 0.2 if task == "regression" else 2.0
    yield from (f'optimizer = {{ name = "sgd", learning_rate = {rate} }}', "")
    yield from ("[privacy]", 'mode = "patient-dp"', "epsilon = 3.0 # TODO", f"delta = {delta:g} # TODO")
    yield from ("clipping_norm = 1.0", "")
