"""A section of the page: a heading that can be linked to, and what stands under it."""

from __future__ import annotations

from dataclasses import dataclass

from editing.report.markup import Markup, element


@dataclass(frozen=True)
class Section:
    """Part of the page.

    Attributes:
        name: for links within the page; letters, digits and hyphens.
        title: heading.
        content: what stands under it.
    """

    name: str
    title: str
    content: Markup

    def html(self) -> Markup:
        return element("section", element("h2", self.title), self.content, id=self.name)

    def link(self) -> Markup:
        return element("li", element("a", self.title, href=f"#{self.name}"))
