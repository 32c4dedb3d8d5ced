"""The FHIR source: bundles and NDJSON give one row a patient or an encounter, and one clear error."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from malformed import STUDY
from typer.testing import CliRunner

from client.cli import app
from client.settings import SiteFolder
from client.site import make_site_keys
from client.sources import read_table
from client.sources.version import data_version
from common.errors import DataError, FedwardError, SiteError
from common.study import parse_study
from common.table import Table

SECRETS = ("8675309", "Zebedee")
LOINC, SNOMED, UCUM = "http://loinc.org", "http://snomed.info/sct", "http://unitsofmeasure.org"
ICD = "http://hl7.org/fhir/sid/icd-10"
SITE = """[site]
name = "malformed"
public_size = 20

[data]
fhir = "export"
fhir_date = 2026-01-01
{more}
[data.columns.sex]
column = "gender"
codes = {{ female = "0", male = "1" }}
[data.fhir_columns]
age = {{ resource = "Patient", value = "age" }}
gender = {{ resource = "Patient", value = "gender" }}
pulse = {{ resource = "Observation", code = "http://loinc.org|8867-4", value = "{value}", unit = "/min" }}
outcome = {{ resource = "Condition", code = "http://hl7.org/fhir/sid/icd-10|I50*", value = "present" }}
{columns}
"""

Resource = dict[str, Any]


def patient(own: str, **more: Any) -> Resource:
    return {"resourceType": "Patient", "id": own, "gender": "male", "birthDate": "1960-06-15", **more}


def quantity(value: Any, unit: str = "/min") -> Resource:
    return {"value": value, "code": unit, "system": UCUM}


def pulse(who: str, value: Any, day: str = "2025-01-01", **more: Any) -> Resource:
    return {
        "resourceType": "Observation",
        "status": "final",
        "code": {"coding": [{"system": SNOMED, "code": "1"}, {"system": LOINC, "code": "8867-4"}]},
        "subject": {"reference": who if "/" in who or ":" in who else f"Patient/{who}"},
        "effectiveDateTime": day,
        "valueQuantity": value if isinstance(value, dict) else quantity(value),
        **more,
    }


def condition(who: str, code: str = "I50.1", **more: Any) -> Resource:
    coding = [{"system": ICD, "code": code}]
    subject = {"reference": f"Patient/{who}"}
    return {"resourceType": "Condition", "code": {"coding": coding}, "subject": subject, **more}


def encounter(own: str, who: str, **more: Any) -> Resource:
    value = {"resourceType": "Encounter", "id": own, "status": "finished", "class": {"code": "IMP"}}
    return {**value, "subject": {"reference": f"Patient/{who}"}, **more}


def bundle(*entries: Resource | tuple[str, Resource]) -> str:
    pairs = [each if isinstance(each, tuple) else (None, each) for each in entries]
    entry = [{"resource": r} if url is None else {"fullUrl": url, "resource": r} for url, r in pairs]
    return json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entry})


def ndjson(*resources: Resource) -> str:
    return "\n".join(json.dumps(each) for each in resources) + "\n"


def site(
    root: Path, files: Mapping[str, str | bytes], value: str = "last", columns: str = "", more: str = ""
) -> SiteFolder:
    (root / "export").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / "export" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (root / "site.toml").write_text(SITE.format(value=value, columns=columns, more=more))
    return SiteFolder(root)


def read(folder: SiteFolder) -> Table:
    return read_table(folder, parse_study(STUDY.encode(), "study"))


def cells(table: Table, *names: str) -> list[tuple[str | None, ...]]:
    held = [(table.columns[n] if n in table.columns else table.rows.column(n)).to_pylist() for n in names]
    return list(zip(*held, strict=True))


def told(folder: SiteFolder, kind: type[FedwardError] = DataError) -> str:
    with pytest.raises(kind) as refusal:
        read(folder)
    text = str(refusal.value)
    assert not any(secret in text for secret in SECRETS), text
    assert refusal.value.remedy
    return text


ONE = (patient("a"), patient("b", gender="female", birthDate="1990"), patient("c", gender="unknown"))
FACTS = (
    pulse("a", 80, "2025-03-01"),
    pulse("a", 70, "2025-02-01T23:00:00-05:00"),
    pulse("a", 95.5, "2025-02-02T02:00:00+00:00"),
    pulse("a", 8675309, "2026-01-01", status="entered-in-error"),
    pulse("b", 60),
    condition("a"),
    condition("b", verificationStatus={"coding": [{"code": "refuted"}]}),
    condition("c", "I5"),
)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("last", "80.0"),
        ("first", "95.5"),
        ("mean", str(245.5 / 3)),
        ("min", "70.0"),
        ("max", "95.5"),
    ],
)
def test_one_row_a_patient(value: str, wanted: str, tmp_path: Path) -> None:
    files = {"Observation.ndjson": ndjson(*FACTS), "Patient.ndjson": ndjson(*ONE)}
    table = read(site(tmp_path, files, value))
    assert cells(table, "patient_id", "age", "sex", "pulse", "outcome") == [
        ("a", "65", "1", wanted, "1"),
        ("b", "36", "0", "60.0", "0"),
        ("c", "65", "unknown", None, "0"),
    ]
    assert (table.place, list(table.locate([2]))) == ("row", [3])


def test_counts_need_no_unit_and_prefixes_and_components_are_found(tmp_path: Path) -> None:
    pressure = pulse(
        "a", {}, component=[pulse("a", 120, "x", code={"coding": [{"system": LOINC, "code": "8480-6"}]})]
    )
    drug = {"coding": [{"system": "rx", "code": "861007"}]}
    order = {
        "resourceType": "MedicationRequest",
        "subject": {"reference": "Patient/a"},
        "medicationCodeableConcept": drug,
    }
    columns = (
        'seen = { resource = "Observation", code = "http://loinc.org|8867-4", value = "count" }\n'
        'systolic = { resource = "Observation", code = "http://loinc.org|8480-6", value = "last", '
        'unit = "/min" }\n'
        'drug = { resource = "MedicationRequest", code = ["rx|1", "rx|8610*"], value = "count" }\n'
        'visits = { resource = "Encounter", value = "count" }\n'
        'died = { resource = "Patient", value = "deceased" }\n'
    )
    others = [
        pressure,
        order,
        {**order, "status": "cancelled"},
        {**order, "doNotPerform": True},
        encounter("e", "a"),
        encounter("f", "a", status="cancelled"),
    ]
    people = (patient("a", deceasedDateTime="2025"), patient("b", deceasedBoolean=False))
    table = read(site(tmp_path, {"bundle.json": bundle(*people, *FACTS[:5], *others)}, columns=columns))
    assert cells(table, "patient_id", "seen", "systolic", "drug", "visits", "died") == [
        ("a", "4", "120.0", "1", "1", "1"),
        ("b", "1", None, "0", "0", "0"),
    ]


def test_one_row_an_encounter(tmp_path: Path) -> None:
    at = {"encounter": {"reference": "Encounter/e1"}}
    resources = [
        *ONE[:2],
        encounter("e1", "a", period={"start": "2020-06-14"}),
        encounter("e2", "a", period={"start": "2020-06-15T08:00:00Z"}),
        encounter("e3", "b", **{"class": {"code": "AMB"}}),
        pulse("a", 80, **at),
        pulse("a", 99),
        condition("a", encounter={"reference": "Encounter/e2"}),
    ]
    more = 'fhir_rows = "encounter"'
    columns = 'kind = { resource = "Encounter", value = "class" }\n'
    folder = site(tmp_path, {"export.ndjson": ndjson(*resources)}, columns=columns, more=more)
    (folder.root / "site.toml").write_text(
        (folder.root / "site.toml").read_text().replace("fhir_date = 2026-01-01\n", "")
    )
    table = read(SiteFolder(folder.root))
    assert cells(table, "patient_id", "encounter_id", "age", "pulse", "outcome", "kind") == [
        ("a", "e1", "59", "80.0", "0", "IMP"),
        ("a", "e2", "60", None, "1", "IMP"),
        ("b", "e3", None, None, "0", "AMB"),
    ]


def test_references_of_every_form_and_overlapping_bundles(tmp_path: Path) -> None:
    uuid = "urn:uuid:0c3151bd-1cbf-4d64-b04d-cd9187a4c6e0"
    one = bundle((uuid, patient("a")), pulse(uuid, 61, "2025-01-01", id="o1"))
    two = bundle((uuid, patient("a")), pulse(uuid, 61, "2025-01-01", id="o1"), pulse("a", 65, "2025-01-02"))
    columns = 'seen = { resource = "Observation", code = "http://loinc.org|8867-4", value = "count" }\n'
    table = read(site(tmp_path, {"one.json": one, "two.json": two}, columns=columns))
    assert cells(table, "patient_id", "pulse", "seen") == [("a", "65.0", "2")]
    far = ndjson(patient("a"), pulse("https://emr/fhir/Patient/a/_history/2", 70))
    assert cells(read(site(tmp_path / "far", {"x.ndjson": far})), "pulse") == [("70.0",)]
    two_servers = ndjson(
        patient("a"), pulse("https://emr/Patient/a", 70), pulse("https://other/Patient/a", 70)
    )
    assert "resources refer to 2 servers by absolute addresses" in told(
        site(tmp_path / "two", {"export.ndjson": two_servers})
    )


def test_records_of_one_person_are_one_patient(tmp_path: Path) -> None:
    old = patient("a", link=[{"type": "replaced-by", "other": {"reference": "Patient/z"}}], birthDate="1900")
    also = patient("m", link=[{"type": "seealso", "other": {"reference": "Patient/a"}}])
    gone = patient("n", link=[{"type": "refer", "other": {"reference": "Patient/elsewhere"}}])
    facts = [pulse("a", 60, "2025-01-01"), pulse("m", 70, "2025-01-02"), condition("z")]
    table = read(site(tmp_path, {"x.ndjson": ndjson(old, also, gone, patient("z"), *facts)}))
    rows = cells(table, "patient_id", "age", "pulse", "outcome")
    assert [row for row in rows if row[0] != "n"] == [("m", "65", "70.0", "1")]


@pytest.mark.parametrize(
    ("value", "unit", "wanted"),
    [
        ({"valueCodeableConcept": {"coding": [{"code": "yes-code"}]}}, "", "yes-code"),
        ({"valueBoolean": True}, "", "1"),
        ({"valueString": "clear"}, "", "clear"),
        ({"valueInteger": 7}, ', unit = "1"', "7.0"),
        ({"valueQuantity": {"value": 7}}, ', unit = "1"', "7.0"),
        ({"valueQuantity": {"value": 7, "unit": "mmHg"}}, ', unit = "mmHg"', "7.0"),
        ({"valueQuantity": {"value": 7, "comparator": "<"}}, "", "7.0"),
        ({"dataAbsentReason": {"text": "unknown"}}, "", None),
    ],
)
def test_observations_of_every_kind(value: Resource, unit: str, wanted: str | None, tmp_path: Path) -> None:
    seen = {**pulse("a", 1, code={"coding": [{"system": "s", "code": "c"}]}), **value}
    if "valueQuantity" not in value:
        del seen["valueQuantity"]
    columns = f'seen = {{ resource = "Observation", code = "s|c", value = "last"{unit} }}'
    table = read(site(tmp_path, {"x.ndjson": ndjson(patient("a"), seen)}, columns=columns))
    assert cells(table, "seen") == [(wanted,)]


def test_equal_times_do_not_hang_on_the_order_of_files(tmp_path: Path) -> None:
    facts = [pulse("a", 60), pulse("a", 80), pulse("a", 70)]
    for name, order in (("one", facts), ("two", facts[::-1])):
        table = read(site(tmp_path / name, {"x.ndjson": ndjson(patient("a"), *order)}))
        assert cells(table, "pulse") == [("80.0",)]


def test_the_mapping_of_units_stands_on_top(tmp_path: Path) -> None:
    more = '[data.columns.pulse]\nunit = "Hz"\nmultiply = 60\n'
    folder = site(tmp_path, {"x.ndjson": ndjson(patient("a"), pulse("a", quantity(1.5, "Hz")))}, more=more)
    text = (tmp_path / "site.toml").read_text().replace('unit = "/min"', 'unit = "Hz"')
    (tmp_path / "site.toml").write_text(text)
    assert [float(p or 0) for (p,) in cells(read(SiteFolder(folder.root)), "pulse")] == [90]


def test_check_works(tmp_path: Path) -> None:
    people = [patient(f"p{i}", gender="female") for i in range(30)]
    files = {
        "Patient.ndjson": ndjson(*people),
        "Condition.ndjson": ndjson(*(condition(f"p{i}") for i in range(9))),
    }
    folder = site(tmp_path / "site", files)
    make_site_keys(folder)
    (tmp_path / "study.toml").write_text(STUDY)
    done = CliRunner().invoke(app, ["check", str(folder.root), str(tmp_path / "study.toml")])
    assert done.exit_code == 0, done.output
    assert "export fits study broken-study" in done.output


def test_what_is_read_has_a_version(tmp_path: Path) -> None:
    folder = site(tmp_path, {"Patient.ndjson": ndjson(patient("a")), "notes.txt": "x"})
    before = data_version(folder)
    (tmp_path / "export" / "notes.txt").write_text("other")
    assert data_version(folder) == before
    (tmp_path / "export" / "Patient.ndjson").write_text(ndjson(patient("b"), patient("c")))
    assert data_version(folder) != before


A = patient("a")
NAMED = {"Zebedee_8675309.json": bundle(A)}
UNFIT: dict[str, tuple[Sequence[Resource], str]] = {
    "unit": (
        [A, pulse("a", quantity(8675309, "Hz"))],
        "column pulse: in another unit than /min (UCUM), once (x.ndjson line 2)",
    ),
    "no-unit": (
        [A, pulse("a", {"value": 8675309})],
        "column pulse: states no unit, where /min is wanted, once",
    ),
    "system": (
        [A, pulse("a", {**quantity(1), "system": "http://our.own"})],
        "in another unit than /min (UCUM)",
    ),
    "text-number": ([A, pulse("a", quantity("8675309"))], "column pulse: its number is none, once"),
    "bool-number": ([A, pulse("a", quantity(True))], "column pulse: its number is none, once"),
    "text": (
        [A, {**pulse("a", 1), "valueQuantity": None, "valueString": "Zebedee"}],
        "what was observed is no quantity",
    ),
    "no-date": (
        [A, pulse("a", 60, "Zebedee")],
        "column pulse: has no date, so that nobody knows first or last",
    ),
    "modifier": ([A, pulse("a", 60, modifierExtension=[{"url": "x"}])], "has a modifierExtension"),
    "birth": (
        [patient("a", birthDate="Zebedee")],
        "column age: the birthDate is no date, once (x.ndjson line 1)",
    ),
    "no-id": ([{"resourceType": "Patient"}], "resource Patient: no valid id, once (x.ndjson line 1)"),
    "bad-id": ([patient("Zebedee 8675309")], "resource Patient: no valid id, once (x.ndjson line 1)"),
    "twice": (
        [A, patient("a", gender="female")],
        "resource Patient: the same id with another content, once (x.ndjson line 2)",
    ),
    "dangling": (
        [A, *(pulse("Zebedee", 60) for _ in range(7))],
        "that counts, 7 times (x.ndjson line 2, x.ndjson line 3",
    ),
    "nobody": (
        [A, {**pulse("a", 60), "subject": {"display": "Zebedee"}}],
        "resources refer to no patient or encounter that counts, once",
    ),
    "nothing": ([pulse("a", 60)], "resources refer to no patient"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_resources_that_do_not_fit_are_counted_and_placed(name: str, tmp_path: Path) -> None:
    resources, says = UNFIT[name]
    text = told(site(tmp_path, {"x.ndjson": ndjson(*resources)}))
    assert "the resources don't fit [data.fhir_columns]" in text
    assert says.replace("x.ndjson", "file 1") in text


BROKEN: dict[str, tuple[dict[str, str | bytes], str]] = {
    "no-json": (
        {"Patient.ndjson": ndjson(A) + '{"id": Zebedee}\n'},
        "export/Patient.ndjson: no JSON in line 2",
    ),
    "cut": ({"Patient.ndjson": ndjson(A)[:-20]}, "Patient.ndjson: no JSON in line 1"),
    "bundle": (
        {"bundle.json": '{"resourceType": "Bundle",\n"entry": [\n{Zebedee'},
        "bundle.json: no JSON in line 3",
    ),
    "utf8": (
        {"Patient.ndjson": ndjson(A).encode() + b'{"id": "\xff8675309"}\n'},
        "Patient.ndjson: not UTF-8 in line 2",
    ),
    "deep": ({"Patient.ndjson": "[" * 200_000 + "\n"}, "Patient.ndjson: nested too deeply in line 1"),
    "nan": (
        {"Patient.ndjson": '{"resourceType": "Patient", "id": NaN}\n'},
        "a number that JSON doesn't have in line 1",
    ),
    "long-number": (
        {"Patient.ndjson": "8" * 5000 + "\n"},
        "Patient.ndjson: a number that JSON doesn't have in line 1",
    ),
    "no-resource": (
        {"Patient.ndjson": '{"patient": "Zebedee"}\n'},
        "no FHIR resource at Patient.ndjson line 1",
    ),
    "a-list": ({"bundle.json": "[]"}, "no FHIR resource at bundle.json entry 1"),
    "entry": (
        {"bundle.json": '{"resourceType": "Bundle", "entry": [7]}'},
        "entry 1 of its bundle is no object",
    ),
    "entries": ({"bundle.json": '{"resourceType": "Bundle", "entry": {}}'}, "its bundle's entry is no list"),
    "empty-bundle": ({"bundle.json": '{"resourceType": "Bundle"}'}, "export: no Patient that counts"),
    "empty": ({"Patient.ndjson": ""}, "Patient.ndjson: is empty"),
    "no-files": ({"patients.csv": "a,b\n"}, "export: no .json or .ndjson file"),
    "named-after-a-patient": ({**NAMED, "a_Zebedee.json": "{"}, "export (file 2 by name): no JSON in line 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_export_ends_in_one_clear_error(name: str, tmp_path: Path) -> None:
    files, says = BROKEN[name]
    assert says in told(site(tmp_path, files))


def test_sizes_are_bounded(tmp_path: Path) -> None:
    files = {"x.ndjson": ndjson(*ONE, *FACTS)}
    assert "bytes, more than 500" in told(site(tmp_path, files, more="max_bytes = 500"))
    assert "more than 3 resources that count" in told(site(tmp_path, files, more="max_records = 3"))


def test_an_encounter_of_another_patient(tmp_path: Path) -> None:
    facts = [encounter("e", "b"), pulse("a", 60, encounter={"reference": "Encounter/e"})]
    folder = site(tmp_path, {"export.ndjson": ndjson(*ONE, *facts)}, more='fhir_rows = "encounter"')
    assert "column pulse: of another patient than its encounter, once (export.ndjson line 5)" in told(folder)


def test_resources_of_nobody_here_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"export.ndjson": ndjson(A, pulse("Zebedee", 8675309), pulse("a", 60))}
    with caplog.at_level(logging.WARNING):
        table = read(site(tmp_path, files, more='dangling = "skip"'))
    assert cells(table, "pulse") == [("60.0",)]
    assert "that counts, once (export.ndjson line 2)" in caplog.text
    assert not any(secret in caplog.text for secret in SECRETS)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ('x = { resource = "Patient", value = "mean" }', "Patient has no mean"),
        ('x = { resource = "Patient", value = "age", code = "a|b" }', "Patient takes no code"),
        ('x = { resource = "Observation", value = "last" }', "Observation needs a code"),
        ('x = { resource = "Observation", value = "mean", code = "a|b" }', "mean needs the unit"),
        (
            'x = { resource = "Condition", value = "present", code = "a|b", unit = "1" }',
            "present has no unit",
        ),
        ('x = { resource = "Condition", value = "present", code = "b" }', "should match pattern"),
        ('x = { resource = "Procedure", value = "present", code = "a|b" }', "resource"),
        ('patient_id = { resource = "Patient", value = "age" }', "are made anyway"),
    ],
)
def test_a_column_that_cannot_be_made(column: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="fhir_columns") as refusal:
        site(tmp_path, {}, columns=column)
    assert says in str(refusal.value)


def test_columns_must_suit_the_rows(tmp_path: Path) -> None:
    folder = site(
        tmp_path, {"x.ndjson": ndjson(A)}, columns='x = { resource = "Encounter", value = "class" }'
    )
    assert "fhir_columns.x: an Encounter's class doesn't go with a row patient" in told(folder, SiteError)
    text = (tmp_path / "site.toml").read_text().replace("fhir_date = 2026-01-01\n", "")
    (tmp_path / "site.toml").write_text(text)
    assert "fhir_columns.age: age on which date?" in told(SiteFolder(tmp_path), SiteError)
