"""Validation of the metadata and tensors of a plan file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neurons.architectures.anatomy import BLOCKS, OUTSIDE
from neurons.errors import BrocaError
from neurons.files.artifact import Artifact

_VECTORS = ("row_scale", "column_scale", "bias")
_MATRICES = ("left", "right", "row_deltas", "column_deltas")
_PLACES = ("rows", "columns")
_WORDS = ("method", "model", "fingerprint", "source", "target")


def require_plan_content(artifact: Artifact, path: Path) -> None:
    """Check the metadata and tensors of a plan.

    Raises:
        BrocaError: names the fault and the module.
    """
    fault = _metadata_fault(artifact.metadata)
    if fault is None:
        modules = {f"{module['layer']}.{module['block']}.": module for module in artifact.metadata["modules"]}
        of_modules: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in modules}
        # The names of "mlp.gate_proj" begin like those of "mlp".
        longest_first = sorted(modules, key=len, reverse=True)
        for name, tensor in artifact.tensors.items():
            owner = next((prefix for prefix in longest_first if name.startswith(prefix)), None)
            if owner is None:
                fault = f"it lists no module of {name}"
                break
            of_modules[owner][name.removeprefix(owner)] = tensor
        for prefix, module in modules.items() if fault is None else ():
            fault = _module_fault(of_modules[prefix], module["block"] in BLOCKS)
            if fault is not None:
                fault = f"layer {module['layer']}, {module['block']}: {fault}"
                break
    if fault is not None:
        raise BrocaError(f"{path}: not a valid plan ({fault}): make it again")


def _metadata_fault(metadata: Mapping[str, Any]) -> str | None:
    if not isinstance(metadata.get("method"), str) or not isinstance(metadata.get("settings"), dict):
        return "it names no method or no settings"
    for name in _WORDS:
        if not isinstance(metadata.get(name), str | None):
            return f"its {name} is {metadata[name]!r}"
    languages = metadata.get("languages", [])
    if not isinstance(languages, list) or not all(isinstance(language, str) for language in languages):
        return f"its languages are {languages!r}"
    modules = metadata.get("modules")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        return "it lists no modules"
    for module in modules:
        layer, block = module.get("layer"), module.get("block")
        valid = type(layer) is int and layer >= OUTSIDE and isinstance(block, str) and block
        if not valid or (layer == OUTSIDE and block in BLOCKS):
            return f"it names a module {block!r} of layer {layer!r}"
        if not isinstance(module.get("notes"), dict):
            return f"layer {layer}, {block}: it has no notes"
    return None


def _module_fault(tensors: Mapping[str, torch.Tensor], output: bool) -> str | None:
    """The first fault in a module's tensors, by their names within it; None without any."""
    known = {"components", *_VECTORS, *_MATRICES, *_PLACES}
    if unknown := sorted(name for name in tensors if name not in known and not name.startswith("details.")):
        return f"it has {unknown[0]}, which this version of Broca does not know"
    components = tensors.get("components")
    if components is None or components.ndim != 1 or components.dtype != torch.int64:
        return "it lists no components"
    if len(components) and (int(components[0]) < 0 or not bool((components.diff() > 0).all())):
        return "its components do not ascend"
    factors = {name: tensors[name] for name in (*_VECTORS, *_MATRICES) if name in tensors}
    for name, tensor in factors.items():
        dimensions = 1 if name in _VECTORS else 2
        if tensor.ndim != dimensions or not tensor.is_floating_point() or not tensor.numel():
            return f"its {name} is {tensor.dtype} of shape {list(tensor.shape)}"
    left, right = factors.get("left"), factors.get("right")
    if (left is None) != (right is None):
        return "it has only one of left and right"
    if left is not None and right is not None and left.shape[1] != right.shape[1]:
        return f"left and right are of ranks {left.shape[1]} and {right.shape[1]}"
    rows = {len(factors[name]) for name in ("row_scale", "left", "bias") if name in factors}
    columns = {len(factors[name]) for name in ("column_scale", "right") if name in factors}
    for name, length, width in (("row", rows, columns), ("column", columns, rows)):
        places, deltas = tensors.get(f"{name}s"), factors.get(f"{name}_deltas")
        if places is None and deltas is None:
            continue
        if (
            places is None
            or deltas is None
            or places.dtype != torch.int64
            or places.shape != deltas.shape[:1]
        ):
            return f"it has no {name} for each of its {name}_deltas"
        if (
            int(places[0]) < 0
            or not bool((places.diff() > 0).all())
            or int(places[-1]) >= min(length, default=2**63)
        ):
            return f"its {name}s do not ascend, or it has fewer"
        width.add(deltas.shape[1])
    if len(rows) > 1 or len(columns) > 1:
        return "its factors are of different sizes"
    if output and len(components) and columns and int(components[-1]) >= max(columns):
        return f"it changes component {int(components[-1])} of {max(columns)} columns"
    for name, values in tensors.items():
        if name.startswith("details.") and (
            values.shape != components.shape or not values.is_floating_point()
        ):
            return f"its {name} are {list(values.shape)} for {len(components)} components"
    return None
