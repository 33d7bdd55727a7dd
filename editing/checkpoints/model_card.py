"""The model card of an edited checkpoint: the edit, its settings, and how to undo it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from editing.plans.plan import ModuleEdit, Plan, language_pair
from neurons.files.artifact import package_versions
from neurons.files.tensor_files import tensor_entries
from neurons.models.fingerprint import PLAN_IN_CHECKPOINT
from neurons.models.source import ModelSource

_DIGEST = re.compile("[0-9a-f]{64}")
RECIPE_IN_CHECKPOINT = Path("broca") / "recipe.toml"
THOUGHTS_OFF = (
    "The model can think before it answers. Its chat template turned thoughts off (`enable_thinking`) while this edit was "
    "made and measured: answers without thoughts are steered, thoughts and the answers after them are not measured."
)
THOUGHTS = {
    "learned": "The model thinks before it answers: thoughts are steered like answers, and both are measured.",
    "kept": "The model thinks before it answers. As the teacher it rarely thinks in the language of its answers, so thoughts "
    "stay as they are, and the answers after them are steered.",
}


def model_card(
    source: ModelSource,
    plan: Plan,
    added: Sequence[str] = (),
    undoable: bool = False,
    repeatable: bool = False,
) -> str:
    """README.md of the output: Broca's section, then the source's card; front matter is kept.

    Args:
        source: the source model.
        plan: the edit.
        added: names of added tensors.
        undoable: whether the checkpoint supports ``broca export --undo``.
        repeatable: whether the checkpoint contains a recipe.
    """
    readme = source.checkpoint / "README.md"
    fields: dict[str, Any] = {}
    original = ""
    if readme.is_file():
        fields, original = split_front_matter(readme.read_text(encoding="utf-8", errors="replace"))
    tags = fields.get("tags") if isinstance(fields.get("tags"), list) else []
    fields["tags"] = [*(tag for tag in tags or [] if tag != "broca"), "broca"]
    if not Path(source.name).expanduser().exists():
        fields["base_model"] = source.name  # a hub id; a local path is meaningless elsewhere
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()
    parts = [f"---\n{front}\n---\n", _section(source, plan, added, undoable, repeatable)]
    if original:
        parts += ["---\n", "# The card of the base model\n", original + "\n"]
    return "\n".join(parts)


class _Yaml12(yaml.SafeLoader):  # type: ignore[misc]
    """Reads ``no`` as a string (Norwegian), as YAML 1.2 and the hub do."""


_Yaml12.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def split_front_matter(card: str) -> tuple[dict[str, Any], str]:
    """The fields between the first ``---`` lines and the text after them.

    Front matter that is not a YAML mapping stays in the text.
    """
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    if match is not None:
        try:
            fields = yaml.load(match[1], Loader=_Yaml12)
        except yaml.YAMLError:
            fields = None
        if isinstance(fields, dict):
            return fields, card[match.end() :].strip()
    return {}, card.strip()


def _section(source: ModelSource, plan: Plan, added: Sequence[str], undoable: bool, repeatable: bool) -> str:
    name = source.name.rstrip("/").split("/")[-1]
    method = plan.metadata["method"]
    pair = language_pair(plan.metadata)
    if pair is not None:
        what = f"from `{pair[0]}` to `{pair[1]}`"
    elif sources := plan.metadata["settings"].get("sources"):
        target = plan.metadata.get("target")
        what = f"questions in {', '.join(f'`{k}`' for k in sources)}" + (f" to `{target}`" if target else "")
    elif not plan.metadata.get("languages"):
        what = "which names no language"
    else:
        what = f"the neurons of {', '.join(f'`{k}`' for k in plan.metadata.get('languages', []))}"
    settings = shown_settings(plan)
    names = tensor_entries(source.checkpoint).keys()
    rows = "\n".join(
        f"| `{source.anatomy.tensor_name(edit.layer, edit.block, names)}` | {len(edit.components)} "
        f"{source.anatomy.component_name(edit.block)}s | {edit.rank + edit.dense} | {shown_change(edit)} |"
        for edit in plan.edits
    )
    measured = _measured(plan.metadata["measured"]) if "measured" in plan.metadata else ""
    if plan.metadata.get("thinks") is False:
        measured = f"{THOUGHTS_OFF}\n\n{measured}"
    elif "thoughts" in plan.metadata:
        measured = f"{THOUGHTS[plan.metadata['thoughts']]}\n\n{measured}"
    also = (
        f"Added, with the config's setting for it: {len(added)} biases, {added[0]} the first.\n\n"
        if added
        else ""
    )
    deltas = " + its deltas of rows and columns" if any(edit.dense for edit in plan.edits) else ""
    undo = (
        "`broca export THIS --undo --out BASE` restores the base model to the bit."
        if undoable
        else "use the base model."
    )
    repeat = (
        f"\n**To repeat the edit**: `broca run {RECIPE_IN_CHECKPOINT.as_posix()} --out DIR`.\n"
        if repeatable
        else ""
    )
    return f"""# {name}, steered by Broca

The weights of this checkpoint were edited by Broca {package_versions()["broca"]} (method `{method}`, \
{what}). It needs no code of its own: architecture, names, shapes and dtypes are those \
of the base model, fingerprint `{source.fingerprint}`.

Settings: {settings}.

{measured}| tensor | components | rank | \\|\\|dW\\|\\| / \\|\\|W\\|\\| |
|---|---|---|---|
{rows}

{also}All other tensors are byte for byte those of the base model.

**To undo the edit**, {undo} The plan, with every number of the edit, is in \
`{PLAN_IN_CHECKPOINT.as_posix()}` (`broca inspect` prints it): each tensor W above became \
diag(r) W diag(c) + U K^T{deltas}, and its bias b, where the plan has a d, b + d, so W can be had back from it up to the rounding of the stored dtype \
(where no scale is 0).
{repeat}"""


def _measured(figures: Mapping[str, Any]) -> str:
    """The tables of ``editing.pipeline.lock_measures.LockFigures``."""
    subject = "Held-out questions"
    if figures["target"] is None:
        subject += " after planted drift: messages in another language"
    lines = [
        f"{subject}; *prompted* is the base model as the teacher, with its instruction or question:",
        "",
        *_tables(figures["target"], "answers", figures),
    ]
    if "thoughts" in figures:
        lines += [
            "The thoughts before these answers:",
            "",
            *_tables(figures["target"], "thoughts", figures["thoughts"]),
        ]
    return "\n".join([*lines, ""])


def _tables(target: str | None, what: str, figures: Mapping[str, Any]) -> list[str]:
    """Both tables of answers, or of thoughts."""
    in_target = f"{what} in " + ("the question's language" if target is None else f"`{target}`")
    alone = "the same questions without drift, in" if target is None else "questions in"
    judged = any(one.get("relevance") for one in figures["sources"].values())
    rows = [
        f"| {source} | {model} | {fractions['whole']:.2f} | {fractions['lines']:.2f} | {_number(one['chrf'][model])} | "
        f"{_number(one['divergence'][model])} |" + (f" {one['relevance'][model]:.2f} |" if judged else "")
        for source, one in figures["sources"].items()
        for model, fractions in one["language"].items()
    ]
    kept = [
        f"| {language} | {one['base']['whole']:.2f} | {one['steered']['whole']:.2f} | {one['divergence']:.3f} |"
        for language, one in figures["kept"].items()
    ]
    heads = [f"| {alone} | base {what} in it | steered {what} in it | KL to base |", "|---|---|---|---|"]
    return [
        f"| questions in | model | {in_target} | every line | chrF to prompted | KL to prompted |"
        + (" relevance by the judge |" if judged else ""),
        "|---|---|---|---|---|---|" + "---|" * judged,
        *rows,
        "",
        *(heads if kept else []),
        *kept,
        "",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={_short(item)}" for key, item in value.items()) or "none"
    text = "none" if value is None else str(value)
    return text[:12] if _DIGEST.fullmatch(text) else text


def shown_settings(plan: Plan) -> str:
    """The settings of a plan in a card."""
    return ", ".join(f"{key} {_short(value)}" for key, value in plan.metadata["settings"].items())


def shown_change(edit: ModuleEdit) -> str:
    """||dW|| / ||W|| in a card."""
    return "-" if edit.relative_change is None else f"{edit.relative_change:.3g}"
