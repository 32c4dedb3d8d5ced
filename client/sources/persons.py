"""Who is who in a FHIR export: references found again, and records of one person brought together."""

from __future__ import annotations

import re

from client.sources.observed import children, reference
from client.sources.resources import Resource

_RELATIVE = re.compile(
    r"(?P<base>.*?)(?P<own>[A-Z][A-Za-z]+/[A-Za-z0-9\-.]{1,64})(/_history/[A-Za-z0-9\-.]{1,64})?"
)
# A record that isn't its person's main one says so by a link of this type.
_SECONDARY = frozenset({"replaced-by", "refer"})


class References:
    """Which resource a reference means, of those that were noted.

    `Type/id` in any export; a bundle's `fullUrl`; an absolute address without one only as long as all of
    them point at one server, since two servers may give one id to two patients.
    """

    def __init__(self) -> None:
        self._urls: dict[str, str] = {}
        self._known: set[str] = set()
        self._base: str | None = None

    def note(self, own: str, url: str | None) -> None:
        """Remember a resource, `Type/id`, and its `fullUrl`."""
        self._known.add(own)
        if url is not None:
            self._urls[url] = own

    def find(self, told: str | None) -> str | None:
        """`Type/id` of what is referred to; None if it isn't there."""
        if told is None:
            return None
        if told in self._urls:
            return self._urls[told]
        parts = _RELATIVE.fullmatch(told)
        if parts is None or parts["own"] not in self._known:
            return None
        if parts["base"]:
            self._base = self._base or parts["base"]
            if parts["base"] != self._base or self._urls:
                return None
        return parts["own"]


class Persons:
    """Patient resources that are one person by their links count as one patient."""

    def __init__(self) -> None:
        self._links: list[tuple[str, str | None]] = []
        self._secondary: set[str] = set()
        self._parent: dict[str, str] = {}

    def note(self, own: str, patient: Resource) -> None:
        """Remember a Patient, `Patient/id`, and what it links to."""
        self._parent[own] = own
        for link in children(patient, "link"):
            self._links.append((own, reference(link, "other")))
            if link.get("type") in _SECONDARY:
                self._secondary.add(own)

    def join(self, references: References) -> None:
        """Bring together whom links join; a link to a Patient who isn't there joins nobody."""
        for own, told in self._links:
            other = references.find(told)
            if other in self._parent:
                a, b = sorted((self.main(own), self.main(other)), key=lambda p: (p in self._secondary, p))
                self._parent[b] = a

    def main(self, own: str) -> str:
        """The main one of the Patients who are this person."""
        while self._parent[own] != own:
            self._parent[own] = own = self._parent[self._parent[own]]
        return own
