"""Generates the API pages of the site, one per folder of the packages, so that every module is included."""

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGES = ("neurons", "editing")


def public(package):
    """Public name -> its module, from `_PUBLIC` of the package, which is not imported."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC":
            return ast.literal_eval(node.value)
    raise ValueError(f"{package}/__init__.py has no _PUBLIC")


def pages():
    """Path of each page -> its Markdown."""
    contents = {}
    start = ["# API reference", "Public names, imported from the package itself:"]
    for package in PACKAGES:
        # A link without a documented target fails the build.
        names = [f"* [`{package}.{name}`][{home}.{name}]" for name, home in public(package).items()]
        start += [f"## `{package}`", "\n".join(names)]
        folders = {}
        for path in sorted((ROOT / package).rglob("*.py")):
            module = path.relative_to(ROOT).with_suffix("")
            if module.name != "__init__":
                folders.setdefault(".".join(module.parts[:2]), []).append(".".join(module.parts))
        for folder, modules in folders.items():
            entries = [f"## `{name}`\n\n::: {name}" for name in modules]
            contents[f"api/{folder}.md"] = "\n\n".join([f"# {folder}", *entries]) + "\n"
    contents["api/index.md"] = "\n\n".join(start) + "\n"
    return contents


def on_config(config):
    config.nav.append(
        {"API reference": ["api/index.md", *(path for path in pages() if path != "api/index.md")]}
    )


def on_files(files, config):
    # The README is a page too, because other pages link to it; links to files outside the site become text.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r"\[([^]]+)\]\((?!docs/|#|https?:)[^)]+\)", r"\1", readme).replace("](docs/", "](")
    for path, text in {**pages(), "overview.md": readme}.items():
        files.append(File.generated(config, path, content=text))


def on_page_markdown(markdown, page, config, files):
    return markdown.replace("](../README.md", "](overview.md")
