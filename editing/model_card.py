"""The model card of a steered checkpoint: what was edited, how, and how to undo it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard

from editing.plan import Plan
from neurons.artifact import package_versions
from neurons.fingerprint import PLAN_IN_CHECKPOINT
from neurons.source import ModelSource


def model_card(source: ModelSource, plan: Plan) -> str:
    """README.md of the output: Broca's section, then the source's own card, whose front matter is kept."""
    readme = source.checkpoint / "README.md"
    if readme.is_file():
        # Some cards have front matter that the hub would refuse; the text is what matters here.
        card = ModelCard(readme.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True)
        fields, original = card.data.to_dict(), card.text.strip()
    else:
        fields, original = {}, ""
    fields["tags"] = [*(tag for tag in fields.get("tags") or [] if tag != "broca"), "broca"]
    if not Path(source.name).expanduser().exists():
        fields["base_model"] = source.name  # a hub id; a local path would mean nothing to a reader
    parts = [f"---\n{CardData(**fields).to_yaml()}\n---\n", _section(source, plan)]
    if original:
        parts += ["---\n", "# The card of the base model\n", original + "\n"]
    return "\n".join(parts)


def _section(source: ModelSource, plan: Plan) -> str:
    name = source.name.rstrip("/").split("/")[-1]
    method = plan.metadata["method"]
    if "target" in plan.metadata:
        what = f"from `{plan.metadata['source']}` to `{plan.metadata['target']}`"
    else:
        what = f"the neurons of {', '.join(f'`{k}`' for k in plan.metadata.get('languages', []))}"
    settings = ", ".join(f"{key} {_short(value)}" for key, value in plan.metadata["settings"].items())
    rows = "\n".join(
        f"| `{source.anatomy.tensor_name(edit.layer, edit.block)}` | {len(edit.components)} "
        f"{source.anatomy.component_name(edit.block)}s | {edit.rank} | {_share(edit.notes or {})} |"
        for edit in plan.edits
    )
    return f"""# {name}, steered by Broca

The weights of this checkpoint were edited by Broca {package_versions()["broca"]} (method `{method}`, \
{what}). It needs no code of its own: architecture, names, shapes and dtypes are those \
of the base model, fingerprint `{source.fingerprint}`.

Settings: {settings}.

| tensor | components | rank | \\|\\|dW\\|\\| / \\|\\|W\\|\\| |
|---|---|---|---|
{rows}

All other tensors are byte for byte those of the base model.

**To undo the edit**, use the base model. The plan, with every number of the edit, is in \
`{PLAN_IN_CHECKPOINT.as_posix()}` (`broca inspect` prints it): each tensor W above became \
diag(r) W diag(c) + U K^T, so W can be had back from it up to the rounding of the stored dtype \
(where no scale is 0).
"""


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={str(item)[:12]}" for key, item in value.items())
    return "none" if value is None else str(value)


def _share(notes: Any) -> str:
    return f"{notes['change_norm'] / notes['weight_norm']:.3g}"
