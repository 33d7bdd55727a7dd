"""A fingerprint of a checkpoint, so that files made with one model are rejected for another.

It covers the config, the names, shapes and dtypes of all tensors, and sampled bytes of each: a digest of all
bytes would cost as much as reading the model.  For an edited checkpoint it also covers the plan, so that even
an edit of one neuron, which sampling could miss, changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from neurons.files.file_states import OncePerState
from neurons.files.tensor_files import TensorEntry, tensor_entries

SAMPLES, SAMPLE_BYTES = 64, 64
PLAN_IN_CHECKPOINT = Path("broca") / "edit.safetensors"
FINGERPRINTS = OncePerState()
# Written by the program that saved the model; without effect on what the model computes.
VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")

Samples = Callable[[Iterable[int], int], Iterable[bytes]]
Tensor = tuple[str, str, Sequence[int], int, Samples]


def fingerprint(checkpoint: Path) -> str:
    """Sixteen hexadecimal digits that identify the model in a checkpoint directory.

    Computed once in a process while the files are unchanged (``neurons.files.file_states``).
    """
    plan = checkpoint / PLAN_IN_CHECKPOINT
    candidates = [*checkpoint.glob("*.json"), *checkpoint.glob("*.safetensors"), plan]
    files = sorted(path for path in candidates if path.is_file())
    return FINGERPRINTS.get(checkpoint, files, lambda: _fingerprint(checkpoint, plan))


def _fingerprint(checkpoint: Path, plan: Path) -> str:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tensors = (
        (name, entry.dtype, entry.shape, entry.end - entry.begin, partial(stored_samples, entry))
        for name, entry in sorted(tensor_entries(checkpoint).items())
    )
    return digest_of(config, tensors, plan.read_bytes() if plan.is_file() else b"")


def digest_of(config: Mapping[str, Any], tensors: Iterable[Tensor], plan: bytes = b"") -> str:
    """The fingerprint of a checkpoint from its contents, which need not be on disk.

    Args:
        config: the values of config.json.
        tensors: (name, dtype, shape, bytes, samples) of every tensor, by name; ``samples(offsets, count)`` gives
            ``count`` bytes of the tensor from each offset.
        plan: of an edited checkpoint.
    """
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, dtype, shape, size, samples in tensors:
        digest.update(json.dumps([name, dtype, list(shape)]).encode())
        offsets = [max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1) for i in range(SAMPLES)]
        for sample in samples(offsets, min(SAMPLE_BYTES, size)):
            digest.update(sample)
    digest.update(plan)
    return digest.hexdigest()[:16]


def stored_samples(entry: TensorEntry, offsets: Iterable[int], count: int) -> Iterator[bytes]:
    """``count`` bytes of a tensor on disk from each offset."""
    with entry.file.open("rb") as stream:
        for offset in offsets:
            stream.seek(entry.begin + offset)
            yield stream.read(count)
