"""Where a result comes from: the model, the text, the packages and the command, as its file names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """What a file says of its own making.

    Attributes:
        model: as it was named; None where the file does not say.
        fingerprint: of the model.
        texts: (digest, part) of all text that was read.
        part: of the text that the figures are of; empty where the file names none.
        inputs: (option, file, digest) of what was read beside the text; of a model the digest is its fingerprint.
        packages: name -> version.
        settings: JSON values.
        command: that makes it again.
        recipe: text of the recipe that the command reads.
        processor: what computed the figures, in words; empty where the file does not say.
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
    """Of a JSON document or a Broca file's metadata; what is missing or of another form is left out."""
    identity = metadata.get("identity")
    if isinstance(identity, Mapping):  # a search's, which keeps them together
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
    # A plan names its text among its settings.
    found = corpora if isinstance(corpora, list) else [measured or settings.get("corpus")]
    texts = [
        (str(one["digest"]), str(one.get("part") or "all"))
        for one in found
        if isinstance(one, Mapping) and "digest" in one
    ]
    return Provenance(
        model=_text(metadata.get("model")),
        fingerprint=_text(metadata.get("fingerprint")),
        texts=tuple(dict.fromkeys(texts)),
        part=str(measured.get("part") or "") if isinstance(measured, Mapping) else "",
        inputs=tuple(
            (str(one["option"]), str(one["file"]), str(one["digest"]))
            for one in (inputs if isinstance(inputs, list) else ())
            if isinstance(one, Mapping) and {"option", "file", "digest"} <= one.keys()
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
    counted = [] if threads is None else [f"{threads} thread{'' if threads == 1 else 's'}"]
    return ", ".join([*known.values(), *counted])


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
