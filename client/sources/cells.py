"""Single values as text, the way a CSV export would write them."""

from __future__ import annotations

from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from uuid import UUID


def text_of(value: object) -> str | None:
    """A value's text: dates and times in ISO 8601, true and false as 1 and 0, None as it is.

    Raises:
        TypeError: for anything that is no single value (bytes, lists, documents, intervals).
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Enum):
        return text_of(value.value)
    raise TypeError
