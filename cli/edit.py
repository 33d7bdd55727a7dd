"""``broca edit``: a direction or a neuron set becomes a plan."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import (
    FILE,
    PARTS,
    CommaSeparated,
    device_options,
    json_option,
    model_argument,
    out_option,
)
from cli.screen import Screen
from cli.tables import plan_table


@click.command("edit")
@model_argument
@click.option(
    "--method",
    type=click.Choice(["keyed", "steer2edit", "scale"]),
    default="keyed",
    show_default=True,
    help="keyed: speaks only where the source language is read (needs --corpus); steer2edit: arXiv "
    "2602.09870; scale: neurons times --factor.",
)
@click.option("--direction", "direction_path", type=FILE, help="From `broca direction`.")
@click.option("--neurons", "neurons_path", type=FILE, help="From `broca identify`; restricts the edit.")
@click.option("--corpus", "corpus_path", type=FILE, help="keyed: text of source, target and others to keep.")
@click.option(
    "--languages",
    type=CommaSeparated(),
    help="keyed: which of the corpus; scale: whose neurons.  [default: all of the corpus; scale: required]",
)
@click.option(
    "--part", type=click.Choice(PARTS), default="all", show_default=True, help="keyed: lines to read."
)
@click.option("--layers", help="As 1-3 or 1,2,5.  [default: all]")
@click.option(
    "--strength",
    type=float,
    help="keyed: the shift in multiples of the direction, shared by the layers; else multiplies the edit.  "
    "[default: keyed 3.5, else 1]",
)
@click.option(
    "--heads-rho", type=float, help="steer2edit: penalty on heads; off if only the neurons' is given."
)
@click.option(
    "--neurons-rho", type=float, help="steer2edit: penalty on neurons; off if only the heads' is given."
)
@click.option("--alpha", type=float, help="steer2edit: sparsity in [0, 1).  [default: 0.2]")
@click.option("--eps", type=float, help="keyed: ridge, a share of the mean variance.  [default: 0.01]")
@click.option("--factor", type=float, help="scale: 0 ablates, 2 doubles.")
@device_options
@out_option("File for the plan (.safetensors).")
@json_option
def command(
    model: str,
    method: str,
    direction_path: Path | None,
    neurons_path: Path | None,
    corpus_path: Path | None,
    languages: tuple[str, ...] | None,
    part: str,
    layers: str | None,
    strength: float | None,
    heads_rho: float | None,
    neurons_rho: float | None,
    alpha: float | None,
    eps: float | None,
    factor: float | None,
    device: str,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    """Plan which weights of MODEL (hub id or directory) change, and how.

    \b
    Examples:
      broca edit artifacts/demo/model --direction direction.safetensors \\
          --corpus artifacts/demo/corpus --out edit.safetensors
      broca edit artifacts/demo/model --method scale --neurons neurons.safetensors \\
          --languages fr --factor 0 --out edit.safetensors
    """
    from editing.direction import load_direction
    from editing.edits import keyed, scale, steer2edit
    from neurons.corpus import read_corpus
    from neurons.errors import UsageError
    from neurons.neuron_set import load_neuron_set
    from neurons.selection import parse_layers
    from neurons.source import load_model, open_model

    screen = Screen(as_json)
    _refuse_foreign(
        method,
        {
            **{f"--{name}": (_given(name), ("keyed",)) for name in ("part", "device", "dtype")},
            "--direction": (direction_path, ("keyed", "steer2edit")),
            "--corpus": (corpus_path, ("keyed",)),
            "--languages": (languages, ("keyed", "scale")),
            "--layers": (layers, ("keyed", "steer2edit")),
            "--heads-rho": (heads_rho, ("steer2edit",)),
            "--neurons-rho": (neurons_rho, ("steer2edit",)),
            "--alpha": (alpha, ("steer2edit",)),
            "--eps": (eps, ("keyed",)),
            "--factor": (factor, ("scale",)),
        },
    )
    if strength is None:
        strength = keyed.STRENGTH if method == "keyed" else 1.0
    source = open_model(model)
    neurons = None if neurons_path is None else load_neuron_set(neurons_path)
    if neurons is not None:
        neurons.require_model(source)
    if method == "scale":
        if neurons is None or languages is None or factor is None:
            raise UsageError("--method scale needs --neurons, --languages and --factor")
        plan = scale.scale_plan(source, neurons, languages, factor)
        if strength != 1.0:
            plan = plan.scaled(strength)
    else:
        if direction_path is None:
            raise UsageError(f"--method {method} needs --direction (from `broca direction`)")
        direction = load_direction(direction_path)
        source.require_fingerprint(direction.metadata, direction_path)
        chosen = None if layers is None else parse_layers(layers, source.anatomy.layers)
        if method == "steer2edit":
            if heads_rho is None and neurons_rho is None:
                heads_rho, neurons_rho = steer2edit.HEADS_RHO, steer2edit.NEURONS_RHO
            plan = steer2edit.steer2edit_plan(
                source,
                direction,
                range(source.anatomy.layers) if chosen is None else chosen,
                heads_rho,
                neurons_rho,
                steer2edit.ALPHA if alpha is None else alpha,
                strength,
                neurons,
            )
        else:
            if corpus_path is None:
                raise UsageError("--method keyed needs --corpus: text of every language that matters")
            corpus = read_corpus(corpus_path, languages, part)
            loaded = load_model(model, device, dtype)
            with screen.progress("Recording the keys", None, "tokens") as advance:
                plan = keyed.keyed_plan(
                    loaded,
                    corpus,
                    direction,
                    chosen,
                    strength,
                    neurons,
                    keyed.EPS if eps is None else eps,
                    advance,
                )
    plan.save(out)
    plan_table(screen, plan, source.anatomy)
    screen.result(
        {
            "out": out,
            "method": method,
            "components": plan.components,
            "relative_change": plan.relative_change(),
            "modules": [
                {"layer": edit.layer, "block": edit.block, "rank": edit.rank, **edit.notes}
                for edit in plan.edits
            ],
        },
        out,
    )


def _given(name: str) -> bool | None:
    """Whether an option that has a default was written by the user."""
    from click.core import ParameterSource

    source = click.get_current_context().get_parameter_source(name)
    return True if source is ParameterSource.COMMANDLINE else None


def _refuse_foreign(method: str, options: dict[str, tuple[object, tuple[str, ...]]]) -> None:
    """An option that a method would not look at is an error, not a silence."""
    from neurons.errors import UsageError

    for name, (value, methods) in options.items():
        if value is not None and method not in methods:
            raise UsageError(f"{name} means nothing to --method {method}: it is for {' and '.join(methods)}")
