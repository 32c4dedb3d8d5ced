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

    `Type/id` in any export; a bundle's `fullUrl`; an absolute address that is no `fullUrl` only as long as
    it and all others lead to one server, since two servers may give one id to two patients. That they don't
    concerns the export as a whole: who is whose must not hang on what other patients' resources say.
    """

    def __init__(self) -> None:
        self._urls: dict[str, str] = {}
        self._known: set[str] = set()
        self._bases: set[str] = set()
        self._guessed = False

    @property
    def servers(self) -> int:
        """To how many absolute addresses lead, once one was taken for a known resource by its id alone."""
        return len(self._bases) if self._guessed else 0

    def note(self, own: str, url: str | None) -> bool:
        """Remember a resource, `Type/id`, and its `fullUrl`; False if that is another one's already."""
        self._known.add(own)
        if url is None:
            return True
        parts = _RELATIVE.fullmatch(url)
        if parts is not None and parts["base"]:
            self._bases.add(parts["base"])
        return self._urls.setdefault(url, own) == own

    def find(self, told: str | None) -> str | None:
        """`Type/id` of what is referred to; None if it isn't there. To be trusted if `servers` is below 2."""
        if told is None:
            return None
        if told in self._urls:
            return self._urls[told]
        parts = _RELATIVE.fullmatch(told)
        if parts is None:
            return None
        if (whole := parts["base"] + parts["own"]) in self._urls:  # a version of it
            return self._urls[whole]
        if parts["own"] not in self._known:
            return None
        if parts["base"]:
            self._guessed = True
            self._bases.add(parts["base"])
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
            if str(link.get("type")) in _SECONDARY:
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
