"""Restore the base of an edited checkpoint bit for bit, from the remainder beside the plan.

``broca/remainder.safetensors`` holds, for each chunk of each edited tensor, the remainder of the inverted and
rounded edit (``editing.plans.remainder``), with digests of both tensors, and the source's README, config and index
if the export replaced them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from editing.checkpoints.checkpoint import CHUNK_BYTES, chunks, write_checkpoint
from editing.plans.plan import load_plan
from editing.plans.remainder import decoded, encoded, integers_of, packed, unpacked
from editing.plans.rounding import round_once
from editing.plans.tensor_edits import TensorEdit, tensor_edits
from neurons.errors import BrocaError
from neurons.files.artifact import FORMAT_VERSION, load_artifact, package_versions
from neurons.files.json_file import checked
from neurons.files.tensor_files import (
    TensorEntry,
    file_entries,
    header_bytes,
    read_bytes,
    read_tensor,
    tensor_entries,
)
from neurons.models.fingerprint import PLAN_IN_CHECKPOINT, fingerprint
from neurons.models.source import ModelSource

REMAINDER_IN_CHECKPOINT = Path("broca") / "remainder.safetensors"
KIND = "remainder"


@dataclass(frozen=True)
class FileChanges:
    """Changes of an export to files other than edited tensors; paths relative to the checkpoint.

    Attributes:
        replaced: files of the source with other content in the output.
        made: new files.
        renamed: file of the source -> its name in the output.
    """

    replaced: tuple[str, ...]
    made: tuple[str, ...]
    renamed: dict[str, str]


@dataclass(frozen=True)
class _Digests:
    """sha256 of a tensor before and after the edit."""

    name: str
    base: str
    edited: str


@dataclass(frozen=True)
class _About(FileChanges):
    """The metadata of a remainder."""

    model: str
    fingerprint: str
    block_bytes: int
    tensors: tuple[_Digests, ...]


def reject_adapter(directory: Path) -> None:
    """
    Raises:
        BrocaError: an adapter, which does not change its base model.
    """
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise BrocaError(
            f"{directory}: an adapter, which does not change its base model, so there is nothing to undo: "
            "load the base model without it"
        )


@dataclass(frozen=True)
class Undone:
    """The result of an undo.

    Attributes:
        path: of the restored checkpoint.
        tensors: names of the restored tensors.
        fingerprint: of the result and of the base.
    """

    path: Path
    tensors: tuple[str, ...]
    fingerprint: str


def write_remainder(
    source: ModelSource,
    edits: Sequence[TensorEdit],
    changes: FileChanges,
    edited: Path,
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """Write the file that ``undo`` needs into an edited checkpoint, with one chunk at a time in memory.

    Args:
        source: the unedited model.
        edits: of its tensors (``tensor_edits``).
        changes: of its files.
        edited: the written checkpoint.
        chunk_bytes: stored bytes of a chunk.

    Returns:
        Bytes of the file.
    """
    place = edited / REMAINDER_IN_CHECKPOINT
    place.parent.mkdir(exist_ok=True)
    parts = place.with_suffix(".parts")
    entries = tensor_entries(edited)
    sizes: dict[str, int] = {}
    tensors: list[dict[str, str]] = []
    with parts.open("xb") as stream:

        def keep(name: str, content: bytes) -> None:
            stream.write(content)
            sizes[name] = len(content)

        for number, name in enumerate(changes.replaced):
            keep(f"file.{number}", (source.checkpoint / name).read_bytes())
        for number, edit in enumerate(edits):
            before, after = hashlib.sha256(), hashlib.sha256()
            entry = entries[edit.entry.name]
            for count, (first, rows) in enumerate(chunks(edit.entry, chunk_bytes)):
                base, changed = read_tensor(edit.entry, rows), read_tensor(entry, rows)
                before.update(_bytes(base))
                after.update(_bytes(changed))
                predicted = round_once(edit.restored(changed, first), base.dtype)
                for kind, values in zip(("small", "own"), encoded(base, predicted), strict=True):
                    keep(f"{number}.{count}.{kind}", packed(values))
            tensors.append({"name": edit.entry.name, "base": before.hexdigest(), "edited": after.hexdigest()})
    about = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "packages": package_versions(),
        "model": source.label,
        "fingerprint": source.fingerprint,
        "block_bytes": chunk_bytes,
        "tensors": tensors,
        "replaced": list(changes.replaced),
        "made": [*changes.made, REMAINDER_IN_CHECKPOINT.as_posix()],
        "renamed": changes.renamed,
    }
    with place.open("xb") as whole, parts.open("rb") as reader:
        described = ((name, "U8", [size], size) for name, size in sizes.items())
        whole.write(header_bytes(described, {"broca": json.dumps(about, sort_keys=True)}))
        shutil.copyfileobj(reader, whole, 1 << 20)
    parts.unlink()
    return place.stat().st_size


def undo(
    edited: ModelSource,
    out: Path,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Undone:
    """Write the base of an edited checkpoint, with the same bits, config and README.

    Args:
        edited: a checkpoint of ``export`` with ``undoable``.
        out: directory to create.
        overwrite: replace an existing checkpoint.
        progress: called with (bytes done, bytes in all).

    Raises:
        BrocaError: no plan, no remainder, a checkpoint that was changed since the export, or an error of
            ``write_checkpoint``.  Nothing is then written.
    """
    remainder = _Remainder(edited)
    plan = load_plan(edited.checkpoint / PLAN_IN_CHECKPOINT)
    if plan.metadata.get("fingerprint") != remainder.about.fingerprint:
        raise BrocaError(
            f"{edited.name}: its plan and its remainder are from different exports: use the base model"
        )
    edits = {edit.entry.name: edit for edit in tensor_edits(edited, plan)}
    digests = {tensor.name: tensor for tensor in remainder.about.tensors}
    names = list(digests)
    missing = [name for name in names if name not in edits]
    if missing:
        raise BrocaError(f"{edited.name}: its plan does not edit {missing[0]}: use the base model")
    for name in names:
        if _digest(edits[name].entry) != digests[name].edited:
            raise BrocaError(
                f"{edited.name}: tensor {name} was changed after the export, so the edit cannot be undone "
                "exactly: use the base model"
            )
    replacements = {name: remainder.restorer(number, edits[name]) for number, name in enumerate(names)}

    def check(staged: Path) -> None:
        entries = tensor_entries(staged)
        for name in names:
            if _digest(entries[name]) != digests[name].base:
                raise BrocaError(
                    f"{edited.name}: tensor {name} is not restored to that of the base: use the base model"
                )
        if fingerprint(staged) != remainder.about.fingerprint:
            raise BrocaError(
                f"{edited.name}: without the edit it is not the base {remainder.about.model} (fingerprint "
                f"{remainder.about.fingerprint}): other tensors or the config were changed after the "
                "export; use the base model"
            )

    write_checkpoint(
        edited.checkpoint,
        out,
        replacements,
        remainder.files(),
        left_out=remainder.about.made,
        renamed={new: old for old, new in remainder.about.renamed.items()},
        complete=check,
        overwrite=overwrite,
        chunk_bytes=remainder.about.block_bytes,
        progress=progress,
    )
    return Undone(out, tuple(names), remainder.about.fingerprint)


class _Remainder:
    """The remainder file of a checkpoint, read in chunks."""

    def __init__(self, edited: ModelSource) -> None:
        self._path = edited.checkpoint / REMAINDER_IN_CHECKPOINT
        if not (edited.checkpoint / PLAN_IN_CHECKPOINT).is_file():
            raise BrocaError(
                f"{edited.name}: has no edit of Broca, so there is nothing to undo: give a checkpoint of "
                "`broca export --undoable`"
            )
        if not self._path.is_file():
            raise BrocaError(
                f"{edited.name}: was exported without --undoable, so it lacks the remainder: use its "
                f"base model, {_base(edited)}"
            )
        try:
            with safe_open(str(self._path), framework="pt") as stream:
                about = json.loads((stream.metadata() or {}).get("broca", "null"))
        except (SafetensorError, OSError, ValueError) as error:
            raise BrocaError(f"{self._path}: cannot be read ({error}): use the base model") from error
        head = about if isinstance(about, dict) else {}
        if head.get("kind") != KIND or head.get("format_version") not in range(FORMAT_VERSION + 1):
            raise BrocaError(f"{self._path}: not a remainder that this Broca can read: update broca")
        self.about = checked(_About, about, self._path)
        self._entries = file_entries(self._path)

    def files(self) -> dict[str, bytes]:
        """The source's content of the files that the export replaced, by path."""
        return {name: self._part(f"file.{number}") for number, name in enumerate(self.about.replaced)}

    def restorer(self, number: int, edit: TensorEdit) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """A function from the edited values of a chunk to its exact base values."""
        counts = {first: i for i, (first, _) in enumerate(chunks(edit.entry, self.about.block_bytes))}

        def restore(chunk: torch.Tensor, first: int) -> torch.Tensor:
            small, raw = (
                unpacked(self._part(f"{number}.{counts[first]}.{kind}"), dtype)
                for kind, dtype in (("small", torch.int8), ("own", integers_of(chunk.dtype)))
            )
            predicted = round_once(edit.restored(chunk, first), chunk.dtype)
            return decoded(predicted, small, raw).double()

        return restore

    def _part(self, name: str) -> bytes:
        if name not in self._entries:
            raise BrocaError(f"{self._path}: damaged, it lacks {name}: use the base model")
        content: bytes = read_bytes(self._entries[name]).numpy().tobytes()
        return content


def _base(edited: ModelSource) -> str:
    """The name of the base model in the plan of an edited checkpoint."""
    about = load_artifact(edited.checkpoint / PLAN_IN_CHECKPOINT, "edit").metadata
    return f"{about.get('model', 'unnamed')} (fingerprint {about.get('fingerprint', 'unknown')})"


def _bytes(values: torch.Tensor) -> memoryview:
    content: memoryview = values.reshape(-1).view(torch.uint8).numpy().data
    return content


def _digest(entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    for _, rows in chunks(entry):
        digest.update(_bytes(read_tensor(entry, rows)))
    return digest.hexdigest()
