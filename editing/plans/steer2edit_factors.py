"""Steer2Edit's files of rank-1 factors (arXiv 2602.09870; Trustworthy-ML-Lab/Steer2Edit, ``edit.py``) as plans.

A file of ``torch.save`` with

    attn    {(layer, head): {"lambda": float, "k_hat": [D]}}      W[:, head] += lambda v k^T
    mlp     {(layer, neuron): {"lambda": float}}                  W[:, neuron] += lambda v
    meta    {"vhat_attn": {layer: v [d]}, "vhat_mlp": {layer: v [d]}, "rho_attn", "rho_mlp", "alpha"}

in which the lambda of a neuron has the sign of w . v.  It names no model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.errors import BrocaError, UsageError
from neurons.models.source import ModelSource
from neurons.neuron_sets.exchange import load_torch_file

# Keys computed in bfloat16 are within one part in 10^4 of the model's; those of another model are nearly orthogonal.
_SAME_KEY = 0.99
_SETTINGS = {"rho_attn": "heads_rho", "rho_mlp": "neurons_rho", "alpha": "alpha"}


def read_factors(path: Path, source: ModelSource) -> Plan:
    """A file of factors as a plan; nothing in it is run.

    Args:
        path: the file.
        source: the model for which it was made; a dense model, as the released code edits no other.

    Raises:
        UsageError: a layer, head or neuron that the model does not have, vectors of other sizes, or keys k that are
            not those of the model's heads.
        BrocaError: no such file, not a file of factors, or numbers that are not finite.
        NothingToChangeError: a file without factors.
    """
    content, digest = load_torch_file(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict) or not all(
        isinstance(content.get(block), dict) for block in ("attn", "mlp")
    ):
        raise BrocaError(f"{path}: not a file of Steer2Edit, which has attn, mlp and meta")
    edits = []
    for block in ("attn", "mlp"):
        by_layer: dict[int, dict[int, Any]] = {}
        for place, factor in content[block].items():
            if not (isinstance(place, tuple) and len(place) == 2 and all(type(i) is int for i in place)):
                raise BrocaError(f"{path}: {block} names {place!r}, which is not a layer and a component")
            by_layer.setdefault(place[0], {})[place[1]] = factor
        source.anatomy.require(block, by_layer)
        vectors = meta.get(f"vhat_{block}")
        for layer, factors in by_layer.items():
            where = f"{path}: layer {layer}, {block}"
            vector = vectors.get(layer) if isinstance(vectors, dict) else None
            edit = _edit(
                source, layer, block, _numbers(vector, source.anatomy.residual, where), factors, where
            )
            if edit is not None:
                edits.append(edit)
    settings = {ours: meta[name] for name, ours in _SETTINGS.items() if type(meta.get(name)) in (int, float)}
    return make_plan(
        edits,
        {
            "model": source.label,
            "fingerprint": source.fingerprint,
            "method": "foreign factors",
            "settings": {"file": path.name, "sha256": digest, **settings},
        },
    )


def _edit(
    source: ModelSource, layer: int, block: str, vector: torch.Tensor, factors: dict[int, Any], where: str
) -> ModuleEdit | None:
    """The edit of one module; None if every lambda is 0."""
    if block == "mlp" and source.anatomy.mixed_in(layer):
        raise UsageError(f"{where}: a mixture of experts, in which the file's neurons are not defined")
    weight = Weights(source).read(layer, block)
    width = source.anatomy.component_width(block, layer)
    right = torch.zeros(weight.shape[1], dtype=torch.float64)
    details: dict[int, tuple[float, float]] = {}
    for component, factor in sorted(factors.items()):
        columns = slice(component * width, (component + 1) * width)
        name = f"{where}, {source.anatomy.component_name(block)} {component}"
        if not 0 <= component < weight.shape[1] // width:
            raise UsageError(
                f"{name}: the model has {weight.shape[1] // width}: it was made for another model"
            )
        size = factor.get("lambda") if isinstance(factor, dict) else None
        if not isinstance(size, int | float) or not math.isfinite(size):
            raise BrocaError(f"{name}: its lambda is {size!r}, not a finite number")
        if not size:
            continue
        key = weight[:, columns].T @ vector
        if block == "attn":
            unit = _numbers(factor.get("k_hat"), width, name)
            if float(key @ unit) < _SAME_KEY * float(key.norm() * unit.norm()):
                raise UsageError(f"{name}: its key is not this model's: it was made for another model")
        else:
            # The file's lambda is that of the formula times this unit key.
            unit = torch.ones_like(key).copysign(key)
            size *= float(unit)
        right[columns] = size * unit
        details[component] = size, size / float(key.norm())
    if not details:
        return None
    return ModuleEdit(
        layer=layer,
        block=block,
        components=tuple(details),
        left=vector[:, None].float(),
        right=right[:, None].float(),
        details={
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in zip(("lambda", "c"), zip(*details.values(), strict=True), strict=True)
        },
        notes={"change_norm": float(vector.norm() * right.norm()), "weight_norm": float(weight.norm())},
    )


def _numbers(value: Any, size: int, where: str) -> torch.Tensor:
    """A vector of a file in float64."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        raise BrocaError(f"{where}: it has no vector: download the file again")
    if value.shape != (size,):
        raise UsageError(
            f"{where}: its vector has shape {list(value.shape)} where the model needs {size} numbers: it was made for "
            "another model"
        )
    numbers = value.double()
    if not bool(torch.isfinite(numbers).all()) or not bool(numbers.any()):
        raise BrocaError(f"{where}: its vector is 0 or not finite: make the file again")
    return numbers
