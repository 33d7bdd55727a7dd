"""The page around the sections: head, style sheet, contents.  It asks for nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from editing.report.markup import element, joined, trusted
from editing.report.sections import Section

GENERATOR = "broca report"
# Each system's own fonts, then Noto's for the scripts that those may lack.
_FONTS = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", "Noto Sans Arabic", '
    '"Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Thai", "Noto Sans CJK SC", '
    '"Noto Sans SC", "PingFang SC", "Microsoft YaHei", "DejaVu Sans", sans-serif'
)
STYLE = f"""
:root {{ color-scheme: light; --ink: #1d2329; --soft: #56616b; --line: #d8dee4; --back: #f6f8fa; --mark: #0a5ea8 }}
* {{ box-sizing: border-box }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100% }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 {_FONTS} }}
:lang(zh) {{ font-family: "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", sans-serif }}
:lang(ja) {{ font-family: "Hiragino Sans", "Yu Gothic", "Noto Sans CJK JP", "Noto Sans JP", sans-serif }}
:lang(ko) {{ font-family: "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans CJK KR", "Noto Sans KR", sans-serif }}
:lang(ar), :lang(fa), :lang(ur) {{ font-family: "Geeza Pro", "Segoe UI", "Noto Naskh Arabic", "Noto Sans Arabic",
  sans-serif; line-height: 1.8 }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem }}
h2 {{ font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .75rem; padding-top: .75rem;
  border-top: 2px solid var(--ink); overflow-wrap: anywhere }}
h3 {{ font-size: 1.05rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere }}
p {{ margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere }}
a {{ color: var(--mark) }}
nav ul {{ list-style: none; padding: 0; margin: 1rem 0; columns: 18rem; column-gap: 2rem }}
nav li {{ margin: .2rem 0; break-inside: avoid; overflow-wrap: anywhere }}
.subtitle {{ color: var(--soft); margin: 0 0 1rem }}
.warning {{ border-inline-start: 4px solid #c77700; background: #fff6e5; padding: .5rem .75rem }}
figure {{ margin: 1.25rem 0 }}
figcaption {{ color: var(--soft); font-size: .9rem; max-width: 46rem; margin-bottom: .4rem;
  overflow-wrap: anywhere }}
.scroll {{ overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px }}
.scroll:focus-visible {{ outline: 2px solid var(--mark) }}
table {{ border-collapse: collapse; font-size: .875rem; line-height: 1.35; min-width: 100%;
  font-variant-numeric: tabular-nums }}
th, td {{ padding: .4rem .65rem; text-align: start; vertical-align: top; border-bottom: 1px solid var(--line) }}
tbody tr:last-child > * {{ border-bottom: 0 }}
thead th {{ background: var(--back); font-weight: 600; vertical-align: bottom }}
th.n, td.n {{ text-align: end; white-space: nowrap }}
thead th.n {{ white-space: normal; min-width: 4.2rem }}
tbody th {{ font-weight: 600; background: #fff; position: sticky; left: 0; min-width: 5.5rem;
  max-width: 14rem;
  box-shadow: 1px 0 var(--line) }}
.heat tbody th {{ min-width: 4rem }}
td:not(.n) {{ min-width: 8rem; max-width: 30rem; overflow-wrap: anywhere }}
.marked > * {{ background: #fff6e5 }}
.heat td.n, .heat thead th.n {{ text-align: center; min-width: 3.4rem }}
td small {{ display: block; font-size: .72rem }}
.bar {{ display: inline-block; min-width: 4.5rem; padding: 0 .3rem; border-radius: 3px;
  background: linear-gradient(to right, #bcd9ef var(--share), #edf1f4 var(--share)) }}
.scale {{ display: flex; align-items: center; gap: .5rem; font-size: .8rem; color: var(--soft);
  margin: .4rem 0 0; font-variant-numeric: tabular-nums }}
.ramp {{ display: inline-block; width: 9rem; height: .8rem; border: 1px solid var(--line);
  background: linear-gradient(to right, #fff, #74add1) }}
.ramp.signed {{ background: linear-gradient(to right, #67a9cf, #fff, #ef8a62) }}
.picture {{ overflow-x: auto }}
.picture svg {{ display: block; max-width: 100%; height: auto }}
svg text {{ font-family: {_FONTS} !important }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt }}
.samples {{ padding-inline-start: 1.4rem }}
.samples > li {{ margin: 0 0 1.5rem; break-inside: avoid }}
.prompt {{ font-weight: 600; margin: 0 0 .35rem }}
.samples dl {{ margin: 0; border-inline-start: 3px solid var(--line); padding-inline-start: .75rem }}
.samples dt {{ font-size: .8rem; color: var(--soft); overflow-wrap: anywhere }}
.samples dd {{ margin: 0 0 .55rem; overflow-wrap: anywhere }}
.tag {{ display: inline-block; padding: 0 .4rem; border-radius: 999px; background: #e7edf2; color: var(--ink);
  font-size: .75rem }}
dl {{ max-width: 46rem }}
.meanings dt {{ font-weight: 600 }}
.meanings dd {{ margin: 0 0 .5rem }}
figure > dl {{ display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1rem;
  margin: 0; font-size: .9rem }}
figure > dl dt {{ color: var(--soft) }}
figure > dl dd {{ margin: 0; overflow-wrap: anywhere }}
code, pre {{ font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace }}
code {{ font-size: .85em; overflow-wrap: anywhere }}
pre {{ background: var(--back); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .75rem;
  font-size: .8rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 }}
@media print {{
  @page {{ size: A4; margin: 14mm 12mm }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact }}
  body {{ max-width: none; padding: 0; font-size: 10pt }}
  nav {{ display: none }}
  a {{ color: inherit; text-decoration: none }}
  h2, h3, figcaption {{ break-after: avoid }}
  .scroll {{ overflow: visible; border: 0 }}
  table {{ font-size: 7.5pt }}
  th, td {{ padding: 2pt 4pt }}
  td small {{ font-size: 5.5pt }}
  tbody th, .heat tbody th {{ position: static; min-width: 0 }}
  thead th.n, td:not(.n), .heat td.n, .heat thead th.n {{ min-width: 0 }}
  .bar {{ min-width: 2.6rem }}
  .picture svg {{ min-width: 0 !important }}
  tr, figure, .picture, .scale {{ break-inside: avoid }}
  .picture svg {{ max-width: 78% }}
}}
"""


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole HTML document.

    Args:
        title: of the study.
        subtitle: a line beneath it.
        sections: in order.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content=GENERATOR),
        # The browser would ask the server for an icon, were there none.
        trusted('<link rel="icon" href="data:,">'),
        element("title", title),
        element("style", trusted(STYLE)),
    )
    contents = element("nav", element("ul", *(section.link() for section in sections)), aria_label="Contents")
    top = element("header", element("h1", title), element("p", subtitle, class_="subtitle"), contents)
    body = element("body", top, element("main", joined(section.html() for section in sections)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"
