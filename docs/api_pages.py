"""Makes the site's API pages, one a room, from the folders, so that no module can be missed."""

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGES = ("neurons", "editing")


def public(package):
    """Public name -> the module that has it, as the package's `_PUBLIC` says, without importing it."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC":
            return ast.literal_eval(node.value)
    raise ValueError(f"{package}/__init__.py has no _PUBLIC")


def pages():
    """Path of a page -> its Markdown."""
    made = {}
    start = ["# API reference", "Public names, imported from the package itself:"]
    for package in PACKAGES:
        # A link whose target no page documents fails the build.
        names = [f"* [`{package}.{name}`][{home}.{name}]" for name, home in public(package).items()]
        start += [f"## `{package}`", "\n".join(names)]
        rooms = {}
        for path in sorted((ROOT / package).rglob("*.py")):
            module = path.relative_to(ROOT).with_suffix("")
            if module.name != "__init__":
                rooms.setdefault(".".join(module.parts[:2]), []).append(".".join(module.parts))
        for room, modules in rooms.items():
            entries = [f"## `{name}`\n\n::: {name}" for name in modules]
            made[f"api/{room}.md"] = "\n\n".join([f"# {room}", *entries]) + "\n"
    made["api/index.md"] = "\n\n".join(start) + "\n"
    return made


def on_config(config):
    config.nav.append(
        {"API reference": ["api/index.md", *(path for path in pages() if path != "api/index.md")]}
    )


def on_files(files, config):
    # The README is a page of the site too, since pages refer to it; files that the site lacks are named only.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r"\[([^]]+)\]\((?!docs/|#|https?:)[^)]+\)", r"\1", readme).replace("](docs/", "](")
    for path, text in {**pages(), "overview.md": readme}.items():
        files.append(File.generated(config, path, content=text))


def on_page_markdown(markdown, page, config, files):
    return markdown.replace("](../README.md", "](overview.md")
