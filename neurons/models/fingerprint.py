"""A fingerprint of a checkpoint, so that files made with one model are rejected for another.

It covers the config, the names, shapes and dtypes of all tensors, and sampled bytes of each: a digest of all
bytes would cost as much as reading the model.  For an edited checkpoint it also covers the plan, so that even
an edit of one neuron, which sampling could miss, changes it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from neurons.files.file_states import OncePerState
from neurons.files.tensor_files import tensor_entries

SAMPLES, SAMPLE_BYTES = 64, 64
PLAN_IN_CHECKPOINT = Path("broca") / "edit.safetensors"
FINGERPRINTS = OncePerState()
# Written by the program that saved the model; without effect on what the model computes.
VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


def fingerprint(checkpoint: Path) -> str:
    """Sixteen hexadecimal digits that identify the model in a checkpoint directory.

    Computed once in a process while the files are unchanged (``neurons.files.file_states``).
    """
    plan = checkpoint / PLAN_IN_CHECKPOINT
    candidates = [*checkpoint.glob("*.json"), *checkpoint.glob("*.safetensors"), plan]
    files = sorted(path for path in candidates if path.is_file())
    return FINGERPRINTS.get(checkpoint, files, lambda: _fingerprint(checkpoint, plan))


def _fingerprint(checkpoint: Path, plan: Path) -> str:
    digest = hashlib.sha256()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, entry in sorted(tensor_entries(checkpoint).items()):
        digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode())
        size = entry.end - entry.begin
        with entry.file.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(entry.begin + max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(stream.read(min(SAMPLE_BYTES, size)))
    if plan.is_file():
        digest.update(plan.read_bytes())
    return digest.hexdigest()[:16]
