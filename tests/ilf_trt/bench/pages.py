"""Reads a page of a report: its elements, whether they are balanced, and what it would load."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Self

VOID = frozenset(("meta", "img", "br"))
LOADING = frozenset(("src", "href", "xlink:href", "action", "data", "srcset", "poster", "background"))


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    text: str = ""
    inside: list["Element"] = field(default_factory=list)

    def all(self, name: str) -> "list[Element]":
        """The elements of that name in it, at any depth."""
        return [each for inner in self.inside for each in ([inner] if inner.name == name else []) + inner.all(name)]

    def words(self) -> str:
        """Its text and that of the elements in it."""
        return " ".join([self.text, *(inner.words() for inner in self.inside)])


class Page(HTMLParser):
    """Fails on an end tag that does not belong to the element that is open."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]

    @classmethod
    def of(cls, text: str) -> Self:
        page = cls()
        page.feed(text)
        page.close()
        assert page._open == [page.root], [each.name for each in page._open]
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        assert len(element.attributes) == len(attrs), f"{tag} has an attribute twice"
        self._open[-1].inside.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data

    @property
    def elements(self) -> list[Element]:
        def below(element: Element) -> list[Element]:
            return [each for inner in element.inside for each in (inner, *below(inner))]

        return below(self.root)

    @property
    def loaded(self) -> list[str]:
        """Every address that a browser would fetch."""
        return [value for each in self.elements for name, value in each.attributes.items() if name in LOADING]
