"""The page's templates (``templates/``): they escape all values, and an undefined value is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from editing.report.formats import NOTHING, breakable, clean, count, number, plain, span
from editing.report.writing import marks

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {
    "breakable": breakable,
    "count": count,
    "marks": marks,
    "number": number,
    "plain": plain,
    "span": span,
}
TEMPLATES.globals["NOTHING"] = NOTHING


def rendered(name: str, **values: Any) -> Markup:
    """``templates/NAME.html.j2`` with these values.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    return Markup(clean(TEMPLATES.get_template(f"{name}.html.j2").render(values)))
