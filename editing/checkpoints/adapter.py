"""Export of a plan as a LoRA adapter (arXiv 2106.09685) in PEFT's file format, for an unchanged base model.

A LoRA adapter adds (alpha / r) B A to a module's weight W [d, n]; with alpha = r its change is exactly

    B A = W' - W,        W' = diag(r) W diag(c) + U K^T + D        (``editing.plans.plan``)

As sums of outer products, with I the rows and J the columns that are scaled and e a unit vector,

    W' - W = U K^T + sum_{j in J} ((c_j - 1) W[:, j]) e_j^T + sum_{i in I} e_i ((r_i - 1) W[i, :] * c)^T + D

where D is such a sum over its rows and columns, so that B and A are the concatenation of these columns and rows, of rank
rank(U) + |J| + |I| + the rows and columns of D.  If that exceeds min(d, n), the factors are the identity and W' - W.

The experts of a mixture are one parameter [E, d, I], of which PEFT adapts each expert with factors of its own and one
rank (``target_parameters``, PEFT 0.17 or newer); an expert with fewer factors has zeros.  vLLM does not read these.

This module writes the two files itself: all versions of PEFT and vLLM read its dozen settings, while PEFT's own
writer adds settings of its latest version, which older readers reject.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from editing.checkpoints.model_card import shown_change, shown_settings
from editing.checkpoints.staging import check_room, check_target, place_apart, staging
from editing.plans.plan import ModuleEdit, Plan
from editing.plans.rounding import round_once
from editing.plans.tensor_edits import check_shape
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, OUTSIDE, Anatomy, Part
from neurons.architectures.layouts import NOT_ADAPTED_IN_VLLM, RENAMED_IN_PEFT
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.files.artifact import json_bytes, package_versions, text_bytes
from neurons.models.fingerprint import PLAN_IN_CHECKPOINT
from neurons.models.source import ModelSource

# Valid values of vLLM's --max-lora-rank; the last is the maximum rank of an adapter.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Modules of these names, in models of mixtures, are read by PEFT as the experts of older files.
_EXPERTS_IN_PEFT = ("down_proj", "w2")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportedAdapter:
    """The result of an adapter export.

    Attributes:
        path: of the adapter's directory.
        modules: full name of each adapted module -> the rank of its change.
        components: heads and neurons edited.
        relative_change: ||dW||_F / ||W||_F over these modules.
    """

    path: Path
    modules: dict[str, int]
    components: int
    relative_change: float | None

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.modules.values())

    @property
    def served_rank(self) -> int:
        """The smallest --max-lora-rank with which vLLM loads the adapter."""
        return next(rank for rank in SERVED_RANKS if rank >= self.rank)


def export_adapter(
    source: ModelSource,
    plan: Plan,
    out: Path,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ExportedAdapter:
    """Write the plan as an adapter directory that PEFT and vLLM load on top of the source model.

    Each module has its own rank (``rank_pattern``), with ``lora_alpha`` equal to it.  The directory includes the
    plan as ``broca/edit.safetensors`` and a card.

    Args:
        source: the unedited model, whose weights are read if the plan scales rows or columns.
        plan: made for it.
        out: directory to create.
        overwrite: replace an existing adapter.
        dtype: of the factors.  float32 by default, whatever the base model's dtype: a plan is float32, the
            factors are small, and loaders can round them if needed.

    Raises:
        BrocaError: the plan was made for another model, does not fit its shapes, adds a bias, which a LoRA
            cannot hold, edits experts that PEFT cannot adapt, or needs a rank that vLLM cannot serve; or the directory
            exists or cannot be written.
        UsageError: a dtype other than float32, bfloat16 or float16.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"dtype {dtype} is not supported: use float32, bfloat16 or float16")
    source.require_fingerprint(plan.metadata, "the plan")
    target = place_apart(source.checkpoint, out)
    modules = _ranks(source, plan)
    check_target(target, overwrite, CONFIG)
    tensors = {}
    weights = Weights(source)
    for edit in plan.edits:
        name = _module_name(source.anatomy, edit)
        if name not in modules:
            continue
        part = adapted(source.anatomy, edit)
        weight = weights.read(edit.layer, edit.block)
        if part.experts is None:
            B, A = factors(edit, weight)
            A = A[:, part.columns]
        else:
            B, A = expert_factors(edit, weight[:, part.columns], part.experts, modules[name])
            name = name.rpartition(".")[0]
        # PEFT's names: the module inside PeftModel and its LoraModel.
        for end, factor in (("lora_A", A), ("lora_B", B)):
            stored = round_once(factor, dtype).contiguous()
            if not bool(torch.isfinite(stored).all()):
                raise BrocaError(f"{name}: its change is too large for {dtype}: use float32")
            tensors[f"base_model.model.{name}.{end}.weight"] = stored
    exported = ExportedAdapter(out, modules, plan.components, plan.relative_change())
    about = json_bytes({**plan.metadata, "packages": package_versions()}).decode()
    files = {
        CONFIG: json_bytes(adapter_config(source, modules)),
        WEIGHTS: save(tensors, metadata={"format": "pt", "broca": about}),
        "README.md": text_bytes(_card(source, plan, exported)),
        PLAN_IN_CHECKPOINT.as_posix(): plan.to_bytes(),
    }
    check_room(target, sum(map(len, files.values())))
    with staging(target, overwrite) as staged:
        for path, content in files.items():
            (staged / path).parent.mkdir(exist_ok=True)
            (staged / path).write_bytes(content)
    return exported


def factors(edit: ModuleEdit, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors B and A of the change of one module.

    Args:
        edit: of the module.
        weight: float64 [d, n], the unedited W.

    Returns:
        B [d, rank] and A [rank, n] in float64 with B A = W' - W.
    """
    d, n = weight.shape
    float64 = torch.float64
    rows, columns = _scaled(edit.row_scale), _scaled(edit.column_scale)
    if len(rows) + len(columns) + edit.rank + edit.dense > min(d, n):
        change = edit.apply(weight) - weight
        return (torch.eye(d, dtype=float64), change) if d <= n else (change, torch.eye(n, dtype=float64))
    left = [torch.zeros(d, 0, dtype=float64)]
    right = [torch.zeros(n, 0, dtype=float64)]
    if edit.left is not None and edit.right is not None:
        left.append(edit.left.to(float64))
        right.append(edit.right.to(float64))
    if edit.column_scale is not None:
        left.append(weight[:, columns] * (edit.column_scale[columns].to(float64) - 1))
        right.append(torch.eye(n, dtype=float64)[:, columns])
    if edit.row_scale is not None:
        scaled = weight[rows] if edit.column_scale is None else weight[rows] * edit.column_scale.to(float64)
        left.append(torch.eye(d, dtype=float64)[:, rows])
        right.append((scaled * (edit.row_scale[rows].to(float64) - 1)[:, None]).T)
    if edit.rows is not None and edit.row_deltas is not None:
        left.append(torch.eye(d, dtype=float64)[:, edit.rows])
        right.append(edit.row_deltas.to(float64).T)
    if edit.columns is not None and edit.column_deltas is not None:
        left.append(edit.column_deltas.to(float64).T)
        right.append(torch.eye(n, dtype=float64)[:, edit.columns])
    return torch.cat(left, dim=1), torch.cat(right, dim=1).T


def expert_factors(
    edit: ModuleEdit, weight: torch.Tensor, experts: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the change of all experts of a mixture, in PEFT's order.

    Args:
        edit: of the MLP.
        weight: float64 [d, E * I], the unedited W of the experts.
        experts: E.
        rank: at least the rank of each expert's change.

    Returns:
        B [d, rank * E], the experts of each rank together, and A [E * rank, I], the ranks of each expert together.
    """
    width = weight.shape[1] // experts
    B = torch.zeros(len(weight), rank, experts, dtype=torch.float64)
    A = torch.zeros(experts, rank, width, dtype=torch.float64)
    for expert in range(experts):
        columns = slice(expert * width, (expert + 1) * width)
        left, right = factors(_within(edit, columns), weight[:, columns])
        B[:, : left.shape[1], expert], A[expert, : len(right)] = left, right
    return B.flatten(1), A.flatten(0, 1)


def _within(edit: ModuleEdit, columns: slice) -> ModuleEdit:
    """The edit of some columns of W, with the ranks that change them."""
    left, right, places, deltas = edit.left, edit.right, edit.columns, edit.column_deltas
    if left is not None and right is not None:
        used = right[columns].any(0)
        left, right = (left[:, used], right[columns][:, used]) if bool(used.any()) else (None, None)
    if places is not None and deltas is not None:
        inside = (places >= columns.start) & (places < columns.stop)
        places, deltas = places[inside] - columns.start, deltas[inside]
    return replace(
        edit,
        left=left,
        right=right,
        column_scale=None if edit.column_scale is None else edit.column_scale[columns],
        row_deltas=None if edit.row_deltas is None else edit.row_deltas[:, columns],
        columns=places,
        column_deltas=deltas,
    )


def rank_of(edit: ModuleEdit, d: int, n: int) -> int:
    """The rank of ``factors`` for a weight [d, n]; 0 if W does not change."""
    return min(len(_scaled(edit.row_scale)) + len(_scaled(edit.column_scale)) + edit.rank + edit.dense, d, n)


def adapter_config(source: ModelSource, modules: dict[str, int]) -> dict[str, Any]:
    """``adapter_config.json`` for modules and parameters of experts (full name -> rank) of the source model."""
    of_experts = [name for name in modules if is_parameter(source.anatomy, name)]
    parameters = {"target_parameters": of_experts} if of_experts else {}
    rank = max(modules[name] for name in of_experts or modules)
    others = {name: of_module for name, of_module in modules.items() if of_module != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.label,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [name for name in modules if name not in of_experts],
        **parameters,
        "fan_in_fan_out": "attn" in source.anatomy.layout.transposed,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def is_parameter(anatomy: Anatomy, name: str) -> bool:
    """Whether the full name is that of the parameter of a mixture's experts, and not of a module."""
    return anatomy.mixed and name.endswith(f".{anatomy.layout.outputs['mlp']}")


def _scaled(scale: torch.Tensor | None) -> torch.Tensor:
    """Indices of the entries of a scale other than 1, ascending."""
    return torch.empty(0, dtype=torch.int64) if scale is None else (scale != 1).nonzero().flatten()


def _module_name(anatomy: Anatomy, edit: ModuleEdit) -> str:
    return f"{anatomy.layout.layers}.{edit.layer}.{adapted(anatomy, edit).path}"


def adapted(anatomy: Anatomy, edit: ModuleEdit) -> Part:
    """The part of W that an edit changes; of one that changes nothing, the last.

    Raises:
        BrocaError: the edit changes a module that is not linear, or experts and a shared expert, or PEFT would take its
            adapter for another.
    """
    if edit.layer == OUTSIDE:
        raise BrocaError(f"{edit.where}: an adapter for it is not read by vLLM: export a checkpoint")
    if anatomy.model_type in RENAMED_IN_PEFT:
        raise BrocaError(f"PEFT does not load adapters for {anatomy.model_type}: export a checkpoint")
    parts = anatomy.parts(edit.layer, edit.block)
    changed = [part for part in parts if edit.changes(part.columns)] or list(parts[-1:])
    part = changed[0]
    where = f"layer {edit.layer}, {edit.block}: the experts of {anatomy.model_type}"
    if len(changed) > 1:
        raise BrocaError(
            f"{where} and its shared expert change, which PEFT does not support in one adapter: export a checkpoint"
        )
    if part.experts is not None:
        # By this attribute PEFT knows the order of the parameter's dimensions.
        if getattr(part.module, "is_transposed", False) != part.transposed:
            raise BrocaError(f"{where} are a parameter that PEFT reads transposed: export a checkpoint")
        return part
    if anatomy.mixed and edit.block not in BLOCKS and type(part.module) is not nn.Linear:
        raise BrocaError(f"{edit.where}: no linear module, so it takes no LoRA adapter: export a checkpoint")
    if anatomy.mixed and part.path.rpartition(".")[2] in _EXPERTS_IN_PEFT:
        raise BrocaError(
            f"layer {edit.layer}, {edit.block}: PEFT takes an adapter of {part.path} in {anatomy.model_type} for one of "
            "the experts: export a checkpoint"
        )
    return part


def _ranks(source: ModelSource, plan: Plan) -> dict[str, int]:
    """Full names of the modules whose weights change, and the ranks of their changes.

    Raises:
        BrocaError: a change that a LoRA adapter cannot hold.
    """
    anatomy = source.anatomy
    weights = Weights(source)
    ranks = {}
    for edit in plan.edits:
        if edit.layer >= anatomy.layers:
            raise BrocaError(f"the plan edits layer {edit.layer}: the model has {anatomy.layers}")
        where = edit.where
        if edit.bias is not None and bool(edit.bias.any()):
            raise BrocaError(
                f"{where}: the plan adds a constant to the module's output, which a LoRA adapter cannot: "
                "export a checkpoint"
            )
        if edit.block in BLOCKS:
            anatomy.require(edit.block, [edit.layer])
        part = adapted(anatomy, edit)
        pieces, rows = weights.pieces(edit.layer, edit.block), anatomy.rows(edit.layer, edit.block)
        check_shape(edit, pieces, rows)
        width = part.width // (part.experts or 1)
        rank = (
            max(
                rank_of(_within(edit, slice(first, first + width)), rows, width)
                for first in range(part.first, part.columns.stop, width)
            )
            if part.experts is not None
            else rank_of(edit, rows, pieces[-1][0].columns.stop)
        )
        if rank > SERVED_RANKS[-1]:
            raise BrocaError(
                f"{where}: the change needs rank {rank} (one for each changed row or column), but vLLM serves "
                f"adapters up to rank {SERVED_RANKS[-1]}: change fewer neurons or export a checkpoint"
            )
        if rank:
            ranks[_module_name(anatomy, edit)] = rank
    # PEFT warns of the rank of a single parameter, so all experts have that of the largest.
    of_experts = [name for name in ranks if is_parameter(anatomy, name)]
    ranks |= dict.fromkeys(of_experts, max((ranks[name] for name in of_experts), default=0))
    if not ranks:
        raise NothingToChangeError("the plan changes no weight, so there is no adapter to write")
    return ranks


def _card(source: ModelSource, plan: Plan, exported: ExportedAdapter) -> str:
    """README.md of the adapter."""
    on_hub = not Path(source.name).expanduser().exists()
    base = f"base_model: {source.name}\n" if on_hub else ""
    rows = "\n".join(
        f"| `{name}` | {len(edit.components)} {source.anatomy.component_name(edit.block)}s | "
        f"{exported.modules[name]} | {shown_change(edit)} |"
        for edit in plan.edits
        if (name := _module_name(source.anatomy, edit)) in exported.modules
    )
    model_type = source.anatomy.model_type
    serving = (
        f"vLLM takes no adapters of {model_type}: export a checkpoint for it."
        if model_type in NOT_ADAPTED_IN_VLLM
        else f"    vllm serve BASE --enable-lora --max-lora-rank {exported.served_rank} --lora-modules "
        "steered=path/of/this/directory"
        if not any(is_parameter(source.anatomy, name) for name in exported.modules)
        else "PEFT 0.17 or newer reads adapters of experts; vLLM does not: export a checkpoint for it."
    )
    return f"""---
{base}library_name: peft
tags:
- lora
- broca
---

# {source.label}, steered by Broca: a LoRA adapter

Made by Broca {package_versions()["broca"]} (method `{plan.metadata["method"]}`) for the model `{source.label}`, \
fingerprint `{source.fingerprint}`. B A is the change of the weights that the plan in \
`{PLAN_IN_CHECKPOINT.as_posix()}` asks for (`broca inspect` prints it).

Settings: {shown_settings(plan)}.

| module | components | rank | \\|\\|dW\\|\\| / \\|\\|W\\|\\| |
|---|---|---|---|
{rows}

    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, "path/of/this/directory")

{serving}

The scale is `lora_alpha / r` = 1 in every module; another one makes the edit weaker or stronger.
"""
