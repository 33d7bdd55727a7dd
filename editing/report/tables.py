"""Tables that scroll in a box of their own where a screen is narrower than they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from editing.report.markup import Content, Markup, element, joined, trusted

LONGEST = 18  # letters of a word in the head of a row


def table(
    caption: Content,
    head: Sequence[Content],
    rows: Sequence[Sequence[Content]],
    words: Collection[int] = (0,),
    marked: Sequence[int] = (),
) -> Markup:
    """A table whose first column names the rows.

    Args:
        caption: says what it shows.
        head: a name a column.
        rows: their cells; what is not Markup is escaped.
        words: numbers of the columns that hold words; the others hold numbers.
        marked: numbers of rows to set off.
    """
    top = element("tr", *(cell("th", name, i not in words, scope="col") for i, name in enumerate(head)))
    body = [
        element(
            "tr",
            *(
                row_name(value) if i == 0 else cell("td", value, i not in words)
                for i, value in enumerate(row)
            ),
            class_="marked" if place in marked else None,
        )
        for place, row in enumerate(rows)
    ]
    return boxed(caption, element("thead", top), element("tbody", *body))


def boxed(caption: Content, *parts: Markup, class_: str | None = None, below: Markup | None = None) -> Markup:
    """A table's parts, in the box that scrolls; the caption, and what stands below, stay where they are."""
    inner = element("table", *parts, class_=class_)
    # A box that scrolls must be reachable by keyboard, and say what it is.
    box = element("div", inner, class_="scroll", tabindex=0, role="group", aria_label="table")
    return element("figure", element("figcaption", caption), box, *([] if below is None else [below]))


def cell(tag: str, value: Content, numeric: bool, scope: str | None = None) -> Markup:
    return element(tag, value, scope=scope, class_="n" if numeric else None)


def row_name(value: Content) -> Markup:
    """The head of a row: it stays in sight while the row scrolls, so a long word may break."""
    if isinstance(value, Markup):
        return element("th", value, scope="row")
    words = (
        joined((word[i : i + LONGEST] for i in range(0, len(word), LONGEST)), trusted("<wbr>"))
        for word in value.split(" ")
    )
    return element("th", joined(words, " "), scope="row")


def settings_table(caption: Content, values: Sequence[tuple[str, Content]]) -> Markup:
    """Names and what they are set to, as a list of pairs."""
    pairs = [joined((element("dt", name), element("dd", value))) for name, value in values]
    return element("figure", element("figcaption", caption), element("dl", *pairs))


def share_bar(share: float, text: str) -> Markup:
    """A share as its number over a bar of its length."""
    percent = max(0.0, min(1.0, share if share == share else 0.0)) * 100
    return element("span", text, class_="bar", style=f"--share:{percent:.1f}%")
