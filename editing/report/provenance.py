"""Provenance of a result: model, text, packages and command, as its file records them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """The provenance that a file records.

    Attributes:
        model: as the user named it; None if not recorded.
        fingerprint: of the model; None if not recorded.
        texts: (digest, part) of all text that was read.
        part: of the text that was measured on; empty if not recorded.
        inputs: (option, file, digest) of further inputs; the digest of a model is its fingerprint.
        packages: name -> version.
        settings: JSON values.
        command: that reproduces the result; None if not recorded.
        recipe: text of the recipe that the command reads; None without a recipe.
        processor: in words; empty if not recorded.
    """

    model: str | None = None
    fingerprint: str | None = None
    texts: tuple[tuple[str, str], ...] = ()
    part: str = ""
    inputs: tuple[tuple[str, str, str], ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None
    recipe: str | None = None
    processor: str = ""


def provenance(metadata: Mapping[str, Any]) -> Provenance:
    """The provenance in a JSON document or a Broca file's metadata; missing or malformed entries are left out."""
    identity = metadata.get("identity")
    if isinstance(identity, Mapping):  # of a search
        corpora = identity.get("corpus")
        parts = corpora.items() if isinstance(corpora, Mapping) else ()
        metadata = {
            **metadata,
            "fingerprint": identity.get("model"),
            "corpora": [{"digest": digest, "part": part} for part, digest in parts],
            "settings": {k: v for k, v in identity.items() if k not in ("model", "corpus", "knobs")},
        }
    packages, settings, inputs = (metadata.get(key) for key in ("packages", "settings", "inputs"))
    settings = settings if isinstance(settings, Mapping) else {}
    corpora, measured = metadata.get("corpora"), metadata.get("corpus")
    # A plan records its text in its settings.
    recorded = corpora if isinstance(corpora, list) else [measured or settings.get("corpus")]
    texts = [
        (str(corpus["digest"]), str(corpus.get("part") or "all"))
        for corpus in recorded
        if isinstance(corpus, Mapping) and "digest" in corpus
    ]
    return Provenance(
        model=_text(metadata.get("model")),
        fingerprint=_text(metadata.get("fingerprint")),
        texts=tuple(dict.fromkeys(texts)),
        part=str(measured.get("part") or "") if isinstance(measured, Mapping) else "",
        inputs=tuple(
            (str(entry["option"]), str(entry["file"]), str(entry["digest"]))
            for entry in (inputs if isinstance(inputs, list) else ())
            if isinstance(entry, Mapping) and {"option", "file", "digest"} <= entry.keys()
        ),
        packages={str(k): str(v) for k, v in packages.items()} if isinstance(packages, Mapping) else {},
        settings=dict(settings),
        command=_text(metadata.get("command")),
        recipe=_text(metadata.get("recipe")),
        processor=_processor(metadata.get("processor")),
    )


def _processor(value: Any) -> str:
    if not isinstance(value, Mapping):
        return ""
    known = {key: str(value[key]) for key in ("device", "name", "instructions") if key in value}
    threads = value.get("threads")
    count = [] if threads is None else [f"{threads} thread{'' if threads == 1 else 's'}"]
    return ", ".join([*known.values(), *count])


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
