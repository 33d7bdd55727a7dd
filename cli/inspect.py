"""``broca inspect``: the content of a Broca file or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.screen import Screen
from cli.tables import direction_table, plan_table

if TYPE_CHECKING:
    from editing.plans.plan import ModuleEdit
    from neurons.architectures.anatomy import Anatomy
    from neurons.neuron_sets.neuron_set import NeuronSet
    from neurons.statistics.statistics import Statistics

MAX_COMPONENTS = 10
MAX_NEURONS = 3  # per language
NOT_SHOWN = {
    "unfinished": "the state of a command that was stopped: repeat the command to finish it",
    "remainder": "from which `broca export --undo` restores the base: name the directory of the checkpoint",
}


@click.command("inspect")
@click.argument("file", type=opt.IN_PATH)
@opt.json
def command(file: Path, as_json: bool) -> None:
    """Show the content of FILE: statistics, neurons, direction, edit, report, or the directory of a checkpoint.

    \b
    Example:
      broca inspect edit.safetensors
    """
    from neurons.errors import BrocaError
    from neurons.files.artifact import load_artifact

    screen = Screen(as_json)
    if file.is_dir():
        _checkpoint(screen, file)
        return
    if file.suffix == ".json":
        _reports(screen, file)
        return
    artifact = load_artifact(file)
    show = {"statistics": _statistics, "neurons": _neurons, "direction": _direction, "edit": _edit}
    if artifact.kind not in show:
        advice = NOT_SHOWN.get(artifact.kind, "which this version cannot show: update broca")
        raise BrocaError(f"{file}: contains {artifact.kind!r}, {advice}")
    show[artifact.kind](screen, file)


def _header(screen: Screen, metadata: dict[str, Any]) -> None:
    from editing.report.formats import plain

    given = {key: value for key, value in metadata.get("settings", {}).items() if value is not None}
    settings = plain(given) if given else ""
    packages = ", ".join(f"{key} {value}" for key, value in metadata["packages"].items())
    model = metadata.get("model") or "an unknown model"
    screen.say(f"{metadata['kind']} of {model} (fingerprint {metadata.get('fingerprint') or 'unknown'})")
    screen.say(
        f"method {metadata.get('method') or 'unknown'}; settings: {settings or 'none'}; made with {packages}"
    )


def _statistics(screen: Screen, file: Path) -> None:
    from neurons.files.artifact import load_artifact
    from neurons.statistics.statistics import load_statistics

    statistics = load_statistics(file)
    metadata = load_artifact(file, "statistics").metadata
    _header(screen, metadata)
    tokens = dict(zip(statistics.languages, statistics.tokens.tolist(), strict=True))
    texts = dict(zip(statistics.languages, statistics.texts.tolist(), strict=True))
    responses = {k: len(statistics.responses[k]) for k in statistics.languages if k in statistics.responses}
    screen.table(
        "statistics",
        ["language", "tokens", "texts", *(["responses"] if responses else [])],
        [[k, tokens[k], texts[k], *([responses.get(k)] if responses else [])] for k in statistics.languages],
    )
    moments = {
        name: {"shape": list(values.shape), "dtype": str(values.dtype).removeprefix("torch.")}
        for name, values in statistics.moments.items()
    }
    prompts = {name: counts.tolist() for name, counts in statistics.prompts.items()}
    screen.table(
        "moments",
        ["site:moment", "layers", "width", "dtype", *(["prompts"] if prompts else [])],
        [
            [name, *moment["shape"][:2], moment["dtype"]]
            + ([sum(prompts[name]) if name in prompts else None] if prompts else [])
            for name, moment in moments.items()
        ],
    )
    value: dict[str, Any] = {
        "tokens": tokens,
        "texts": texts,
        "responses": responses,
        "moments": moments,
        "prompts": prompts,
    }
    if statistics.routed is not None:
        value["routing"] = _routing(screen, statistics)
        screen.say(f"{statistics.experts} experts per layer; `broca plot --what routing` shows the routing")
    screen.document({**metadata, **value, "experts": statistics.experts})


def _routing(screen: Screen, statistics: Statistics) -> dict[str, Any] | None:
    """The experts that each language shares least with others, by layer; None without the routers' scores."""
    from neurons.statistics.routing import (
        ROUTING,
        default_top,
        routed_fraction,
        routing_divergence,
        routing_shares,
    )

    if ROUTING not in statistics.moments:
        return None
    fraction = routed_fraction(statistics)
    shares, divergence = routing_shares(fraction), routing_divergence(fraction)
    largest = shares.max(dim=1)
    screen.table(
        f"routing: each language's expert with the largest share, and that share (of its {default_top(fraction)} experts)",
        ["layer", "divergence", *statistics.languages],
        [
            [str(layer), float(divergence[layer]), *(f"{expert} ({share:.2f})" for expert, share in own)]
            for layer in fraction.flatten(1).any(1).nonzero()[:, 0].tolist()
            for own in [zip(largest.indices[layer].tolist(), largest.values[layer].tolist(), strict=True)]
        ],
    )
    return {
        "fraction": fraction.tolist(),
        "share": shares.tolist(),
        "divergence": divergence.tolist(),
        "mean_score": (statistics.moment(ROUTING) / statistics.tokens).tolist(),
    }


def _neurons(screen: Screen, file: Path) -> None:
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.scorers.selection import KINDS

    neuron_set = load_neuron_set(file)
    _header(screen, neuron_set.metadata)
    rows = []
    for language in neuron_set.languages:
        layers = [len(rows) for rows in neuron_set.by_layer(language)]
        largest = sorted(range(neuron_set.layers), key=lambda layer: (-layers[layer], layer))[:3]
        shown = ", ".join(f"{layer} ({layers[layer]})" for layer in largest if layers[layer])
        rows.append([language, sum(layers), *neuron_set.kind_counts(language).values(), shown or "-"])
    experts = f", {neuron_set.experts} experts per layer" if neuron_set.experts > 1 else ""
    screen.table(
        f"neuron set, {neuron_set.layers} layers x {neuron_set.neurons} {neuron_set.unit}s{experts}",
        ["language", f"{neuron_set.unit}s", *KINDS, f"layers with most {neuron_set.unit}s"],
        rows,
    )
    name = neuron_set.unit if neuron_set.experts == 1 else "(expert, neuron)"
    screen.table(
        f"largest scores, up to {MAX_NEURONS} per language",
        ["language", "layer", name, "score", "kind"],
        [
            [k, str(layer), _neuron_name(neuron, neuron_set), score, KINDS[kind]]
            for k in neuron_set.languages
            for layer, neuron, score, kind in _largest(neuron_set, k)
        ],
    )
    value = {
        **neuron_set.metadata,
        "by_layer": {k: [len(rows) for rows in neuron_set.by_layer(k)] for k in neuron_set.languages},
        "kinds": {k: neuron_set.kind_counts(k) for k in neuron_set.languages},
        "members": {k: neuron_set.of(k).tolist() for k in neuron_set.languages},
        "scores": {k: neuron_set.scores[k].tolist() for k in neuron_set.languages},
        "member_kinds": {
            k: [KINDS[kind] for kind in neuron_set.kinds[k].tolist()] for k in neuron_set.languages
        },
    }
    if neuron_set.experts > 1:
        width = neuron_set.neurons // neuron_set.experts
        value["expert_members"] = {
            k: [[layer, neuron // width, neuron % width] for layer, neuron in neuron_set.of(k).tolist()]
            for k in neuron_set.languages
        }
    screen.document(value)


def _largest(neuron_set: NeuronSet, language: str) -> list[tuple[int, int, float, int]]:
    """(layer, neuron, score, kind) of the neurons with the largest scores."""
    rows, scores, kinds = neuron_set.of(language), neuron_set.scores[language], neuron_set.kinds[language]
    best = scores.argsort(descending=True, stable=True)[:MAX_NEURONS]
    return [(*rows[i].tolist(), float(scores[i]), int(kinds[i])) for i in best.tolist()]


def _neuron_name(neuron: int, neuron_set: NeuronSet) -> str:
    """The index of a neuron in its layer, or (expert, index in the expert)."""
    if neuron_set.experts == 1:
        return str(neuron)
    width = neuron_set.neurons // neuron_set.experts
    return f"({neuron // width}, {neuron % width})"


def _direction(screen: Screen, file: Path) -> None:
    from editing.directions.direction import load_direction

    direction = load_direction(file)
    _header(screen, direction.metadata)
    norms = direction_table(screen, direction)
    screen.document({**direction.metadata, "norms": norms})


def _edit(screen: Screen, file: Path) -> None:
    from editing.plans.plan import load_plan
    from editing.plans.plan_warnings import plan_warnings

    plan = load_plan(file)
    _header(screen, plan.metadata)
    plan_table(screen, plan)
    names = list(dict.fromkeys(name for edit in plan.edits for name in edit.details))
    for warning in plan_warnings(plan):
        screen.warn(warning)
    strongest = sorted(
        (
            (change, edit.layer, edit.block, component, {k: float(v[i]) for k, v in edit.details.items()})
            for edit in plan.edits
            if edit.components
            for i, (component, change) in enumerate(_changes(edit))
        ),
        key=lambda row: (-row[0], row[1:4]),
    )[:MAX_COMPONENTS]
    screen.table(
        "strongest components",
        ["layer", "module", "component", "||dW||", *names],
        [
            [str(layer), block, component, change, *(values.get(k) for k in names)]
            for change, layer, block, component, values in strongest
        ],
    )
    screen.document(
        {
            **plan.metadata,
            "components": plan.components,
            "relative_change": plan.relative_change(),
            "warnings": plan_warnings(plan),
            "strongest": [
                {"layer": layer, "block": block, "component": component, "change": change, **values}
                for change, layer, block, component, values in strongest
            ],
        }
    )


def _changes(edit: ModuleEdit) -> list[tuple[int, float]]:
    """Each component and the norm of its change."""
    from editing.plans.component_changes import component_changes, component_count

    changes = component_changes(edit, component_count(edit))[list(edit.components)]
    return list(zip(edit.components, changes.tolist(), strict=True))


def _reports(screen: Screen, file: Path) -> None:
    from cli.tables import report_table
    from editing.study.results import load_reports
    from neurons.errors import BrocaError, UsageError
    from neurons.files.json_file import document

    try:
        reports = load_reports(file)
    except UsageError as error:
        raise BrocaError(f"{error}; of JSON files, only reports are shown: see `broca report`") from error
    for report in reports:
        report_table(screen, report)
    screen.document({"reports": list(map(document, reports))})


def _checkpoint(screen: Screen, directory: Path) -> None:
    from editing.checkpoints.export import read_exported_plan
    from editing.plans.plan import load_plan
    from neurons.files.tensor_files import tensor_entries
    from neurons.models.source import open_model

    source = open_model(str(directory))
    entries = tensor_entries(source.checkpoint)
    anatomy = source.anatomy
    dtypes: dict[str, int] = {}
    for entry in entries.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.end - entry.begin
    rows: list[list[Any]] = [
        ["architecture", anatomy.model_type],
        ["fingerprint", source.fingerprint],
        ["layers", anatomy.layers],
        ["residual width", anatomy.residual],
        ["neurons a layer", anatomy.neurons],
        ["heads a layer", f"{anatomy.heads}, of width {anatomy.head_dim}"],
        *_lacking(anatomy),
        ["tensors", len(entries)],
        ["bytes", ", ".join(f"{size:,} {dtype}" for dtype, size in sorted(dtypes.items()))],
    ]
    screen.table(str(directory), ["checkpoint", ""], rows)
    path = read_exported_plan(source.checkpoint)
    value: dict[str, Any] = {str(name).replace(" ", "_"): content for name, content in rows}
    if path is None:
        screen.say("it contains no plan of Broca")
    else:
        plan = load_plan(path)
        screen.say(f"edited by Broca; plan: {path}")
        plan_table(screen, plan, anatomy)
        value["plan"] = plan.metadata
    screen.document(value)


def _lacking(anatomy: Anatomy) -> list[list[Any]]:
    """Rows for layers without heads or neurons to edit, or with others that are not."""
    rows: list[list[Any]] = []
    for block in ("attn", "mlp"):
        layers = [layer for layer in range(anatomy.layers) if not anatomy.has(layer, block)]
        kinds = dict.fromkeys(anatomy.attention[layer] if block == "attn" else "no MLP" for layer in layers)
        if layers:
            name = f"layers without {anatomy.component_name(block)}s"
            rows.append([name, f"{', '.join(map(str, layers))} ({', '.join(kinds)})"])
    if unread := anatomy.unread_experts():
        rows.append(["layers with experts that are not edited", ", ".join(map(str, unread))])
    return rows
