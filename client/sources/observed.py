"""What a FHIR R4 resource says: codes, quantities in their unit, dates, references, and if it counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any

from client.origins import FhirColumn
from client.sources.resources import Resource

UCUM = "http://unitsofmeasure.org"
_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}")
_DATE = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2})(T.*)?)?)?")
# Of Observations these count; of the others all but these.
_OBSERVED = frozenset({"final", "amended", "corrected"})
_VOID = {
    "Encounter": frozenset({"planned", "cancelled", "entered-in-error"}),
    "MedicationRequest": frozenset({"draft", "cancelled", "entered-in-error"}),
}
_DENIED = frozenset({"refuted", "entered-in-error"})


class Unfit(Exception):
    """A resource that can't be what its column wants; the text quotes no value."""


def child(value: Any, name: str) -> dict[str, Any]:
    """The object of this name; an empty one where there is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def children(value: Any, name: str) -> list[dict[str, Any]]:
    """The objects in the list of this name."""
    found = value.get(name) if isinstance(value, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def identifier(resource: Resource) -> str | None:
    """The resource's id, if it has a valid one."""
    found = resource.get("id")
    return found if isinstance(found, str) and _ID.fullmatch(found) else None


def reference(resource: Resource, name: str) -> str | None:
    """What the resource refers to by this element."""
    found = child(resource, name).get("reference")
    return found if isinstance(found, str) else None


def counts(resource: Resource) -> bool:
    """Whether the resource stands: no draft, no mistake, nothing refuted, no order not to do something."""
    kind, status = resource["resourceType"], resource.get("status")
    if kind == "Observation":
        return str(status) in _OBSERVED
    if kind == "Condition":
        said = {str(c.get("code")) for c in children(child(resource, "verificationStatus"), "coding")}
        return not said & _DENIED
    return str(status) not in _VOID.get(kind, frozenset()) and resource.get("doNotPerform") is not True


def coded(concept: Any, column: FhirColumn) -> bool:
    """Whether a CodeableConcept has one of the column's codes."""
    codings = children(concept, "coding")
    found = [(c.get("system"), c["code"]) for c in codings if isinstance(c.get("code"), str)]
    for wanted in column.codes:
        system, code = wanted.split("|", 1)
        stem = code.removesuffix("*")
        if any(s == system and (c == code or (stem != code and c.startswith(stem))) for s, c in found):
            return True
    return False


def matches(resource: Resource, column: FhirColumn) -> Iterator[Resource]:
    """The resource itself if its code is the column's, and each component of an Observation whose code is."""
    if column.resource == "MedicationRequest":
        if coded(resource.get("medicationCodeableConcept"), column):
            yield resource
        return
    if not column.codes or coded(resource.get("code"), column):
        yield resource
    if column.resource == "Observation":
        yield from (each for each in children(resource, "component") if coded(each.get("code"), column))


def observed(part: Resource, column: FhirColumn) -> float | str | None:
    """What an Observation, or a component, observed: a number in the column's unit, or text; None if nothing.

    A quantity with a comparator counts as its bound.

    Raises:
        Unfit: if the unit is another, or there is no number where one is needed.
    """
    if isinstance(quantity := part.get("valueQuantity"), dict):
        value = quantity.get("value")
        if value is None:
            return None
        _check_unit(quantity, column.unit)
        return _number(value)
    if "valueInteger" in part:
        _check_unit({}, column.unit)
        return _number(part["valueInteger"])
    found: str | None = None
    if isinstance(part.get("valueBoolean"), bool):
        found = str(int(part["valueBoolean"]))
    elif "valueCodeableConcept" in part:
        codes = [c.get("code") for c in children(part["valueCodeableConcept"], "coding")]
        found = next((code for code in codes if isinstance(code, str)), None)
    else:
        texts = (part.get(name) for name in ("valueString", "valueDateTime", "valueTime"))
        found = next((text for text in texts if isinstance(text, str)), None)
    if found is not None and (column.value not in ("first", "last") or column.unit is not None):
        raise Unfit("what was observed is no quantity")
    return found


def _check_unit(quantity: dict[str, Any], unit: str | None) -> None:
    stated = quantity.get("code", quantity.get("unit"))
    if stated in (None, "1") and unit in (None, "1"):
        return
    if unit is None:
        raise Unfit("has a unit, and the mapping says none")
    if stated is None:
        raise Unfit(f"states no unit, where {unit} is wanted")
    if stated != unit or ("code" in quantity and quantity.get("system", UCUM) != UCUM):
        raise Unfit(f"in another unit than {unit} (UCUM)")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit("its number is none")
    try:
        found = float(value)
    except OverflowError:  # of a whole number
        raise Unfit("its number is too large") from None
    if not math.isfinite(found):
        raise Unfit("its number is too large")
    return found


def moment(text: Any) -> datetime | None:
    """The beginning of a FHIR date or time (year, month, day or instant), in UTC; None if it is none."""
    parts = _DATE.fullmatch(text) if isinstance(text, str) else None
    if parts is None:
        return None
    try:
        if parts[4]:
            found = datetime.fromisoformat(parts[0])
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        return datetime(int(parts[1]), int(parts[2] or 1), int(parts[3] or 1), tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def observed_at(resource: Resource) -> datetime | None:
    """When an Observation holds, or else when it was issued."""
    period = child(resource, "effectivePeriod")
    named = (resource.get("effectiveDateTime"), resource.get("effectiveInstant"), period.get("start"))
    return next((at for each in (*named, resource.get("issued")) if (at := moment(each))), None)


def years(born: date, at: date) -> int:
    """Whole years from birth to a date."""
    return at.year - born.year - ((at.month, at.day) < (born.month, born.day))
