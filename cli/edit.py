"""``broca edit``: a direction, a vector, a neuron set or other plans become a plan."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli.corpora import read, tell_read
from cli.options import (
    FINITE,
    IN_DIRECTORY,
    IN_FILE,
    OUT_FILE,
    PARTS,
    CommaSeparated,
    Many,
    device_options,
    dry_run_option,
    json_option,
    tokens_option,
)
from cli.screen import Screen
from cli.tables import plan_table

if TYPE_CHECKING:
    from editing.methods.material import Material
    from editing.methods.method import Method
    from editing.plans.plan import Plan
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel, ModelSource

LIST = "list"
# Options that are settings of a method by another spelling.
SPELLED_OUT = ("heads_rho", "neurons_rho", "alpha", "eps", "factor")


@click.command("edit", cls=Many)
@click.argument("model", required=False)
@click.option("--method", default="keyed", show_default=True, help="One of `broca edit --method list`.")
@click.option("--direction", "directions", type=IN_FILE, multiple=True, help="From `broca direction`.")
@click.option(
    "--vector",
    type=IN_FILE,
    help="bake: steering vectors of another library (.safetensors, .gguf, .pt or .npy).",
)
@click.option(
    "--neurons", type=IN_FILE, help="From `broca identify`; restricts the edit, or is what is scaled."
)
@click.option("--statistics", type=IN_FILE, help="From `broca record`, for clas and austeer.")
@click.option(
    "--corpus",
    type=IN_DIRECTORY,
    help="Text: for keyed of source, target and all others to keep; for bake and biprojected ablate neutral text.",
)
@click.option(
    "--languages",
    type=CommaSeparated(),
    help="Which of the corpus; without one, whose neurons.  [default: all]",
)
@click.option("--part", type=click.Choice(PARTS), help="Which lines of the corpus.  [default: all]")
@click.option("--layers", help="As 1-3 or 1,2,5.  [default: the method's]")
@click.option("--blocks", type=CommaSeparated(), help="attn, mlp or both.  [default: the method's]")
@click.option(
    "--strength",
    type=FINITE,
    help="keyed: the shift in multiples of the direction, shared by the layers; else multiplies the edit.  "
    "[default: keyed 3.5, else 1]",
)
@click.option("--heads-rho", help="steer2edit: penalty on heads; off if only the neurons' is given.")
@click.option("--neurons-rho", help="steer2edit: penalty on neurons; off if only the heads' is given.")
@click.option("--alpha", help="steer2edit: sparsity in [0, 1).  [default: 0.2]")
@click.option("--eps", help="keyed, bake: ridge, a share of the mean variance.  [default: 0.01]")
@click.option("--factor", help="scale: 0 ablates, 2 doubles.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another setting of the method (--method list shows them).",
)
@click.option(
    "--compose", type=IN_FILE, multiple=True, metavar="EDIT...", help="Plans to do one after another."
)
@click.option("--invert", type=IN_FILE, metavar="EDIT", help="A plan to take back; needs MODEL.")
@click.option(
    "--restrict",
    type=IN_FILE,
    metavar="EDIT",
    help="A plan to cut to --layers, --heads and --neurons; needs MODEL.",
)
@click.option("--heads", help="--restrict: heads that may change, as 0,3.")
@tokens_option
@device_options
@dry_run_option
@click.option("--out", type=OUT_FILE, help="File for the plan (.safetensors).")
@json_option
def command(**options: Any) -> None:
    """Plan which weights of MODEL (hub id or directory) change, and how.

    \b
    Examples:
      broca edit artifacts/demo/model --direction direction.safetensors \\
          --corpus artifacts/demo/corpus --out edit.safetensors
      broca edit artifacts/demo/model --method scale --neurons neurons.safetensors \\
          --languages fr --factor 0 --out edit.safetensors
      broca edit artifacts/demo/model --method bake --direction direction.safetensors \\
          --layers 3 --corpus artifacts/demo/corpus --out edit.safetensors
      broca edit artifacts/demo/model --method ablate --set form=biprojected \\
          --direction direction.safetensors --corpus artifacts/demo/corpus --languages en \\
          --out edit.safetensors
      broca edit --compose first.safetensors second.safetensors --out both.safetensors
      broca edit artifacts/demo/model --restrict edit.safetensors --layers 2-5 --out cut.safetensors
      broca edit --method list
    """
    asked = SimpleNamespace(**options)
    screen = Screen(asked.as_json)
    if asked.method == LIST:
        _list(screen)
        return
    from neurons.errors import UsageError

    if asked.out is None:
        raise UsageError("--out is missing: name the file for the plan")
    _keep_inputs(asked)
    operations = [name for name in ("compose", "invert", "restrict") if getattr(asked, name)]
    if len(operations) > 1:
        raise UsageError(f"--{' and --'.join(operations)} exclude each other: do one after the other")
    found = _of_plans(asked, operations[0]) if operations else _by_method(screen, asked)
    if found is None:
        return
    plan, source = found
    plan.save(asked.out)
    _show(screen, plan, source, asked)


def _by_method(screen: Screen, asked: SimpleNamespace) -> tuple[Plan, ModelSource] | None:
    from editing.directions.direction import load_direction
    from editing.methods.material import Material
    from editing.study.registry import edit_named
    from neurons.errors import UsageError
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.scorers.selection import parse_layers
    from neurons.scorers.setting import assigned, read_settings
    from neurons.statistics.statistics import load_statistics
    from neurons.text.corpus_files import language_label

    method = edit_named(asked.method)
    if asked.model is None:
        raise UsageError("name the MODEL that is to be edited")
    _refuse_foreign(asked, method)
    own = {name: value for name in SPELLED_OUT if (value := getattr(asked, name)) is not None}
    typed = {name: f"{_spelled(name)} {value}" for name, value in own.items()}
    given = {**own, **assigned(asked.assignments, tuple(own))}
    settings = read_settings(method.settings(), given, typed)
    if asked.strength is not None:
        settings["strength"] = asked.strength
    one = method(**settings)
    labels = None if asked.languages is None else tuple(map(language_label, asked.languages))
    material = Material(
        asked.model,
        device=asked.device,
        dtype=asked.dtype,
        directions=tuple(load_direction(path) for path in asked.directions),
        vector=asked.vector,
        neurons=None if asked.neurons is None else load_neuron_set(asked.neurons),
        statistics=None if asked.statistics is None else load_statistics(asked.statistics),
        corpus=None
        if asked.corpus is None
        else replace(
            read(screen, asked.corpus, asked.languages, asked.part or "all", method.min_languages),
            tokens=asked.tokens,
        ),
        languages=labels,
        blocks=asked.blocks,
    )
    source = material.opened
    for path, direction in zip(asked.directions, material.directions, strict=True):
        source.require_fingerprint(direction.metadata, path)
    if material.neurons is not None:
        material.neurons.require_model(source)
    if asked.layers is not None:
        material.layers = parse_layers(asked.layers, source.anatomy.layers)
    if asked.dry_run:
        _dry_run(screen, asked, material, one)
        return None
    with screen.progress("Recording activations", None, "tokens") as advance:
        material.progress = advance
        plan = one.plan_for(material)
    if read_of := plan.metadata.get("read"):
        from neurons.text.token_budget import KEYS

        tell_read(screen, read_of, KEYS.minimum)
    return plan, source


def _dry_run(screen: Screen, asked: SimpleNamespace, material: Material, method: Method) -> None:
    """What the method needs, where it reads text; others read the weights a tensor at a time."""
    from cli.dry_run import dry_run
    from editing.pipeline.needs import key_need, learning_need, writing_need
    from neurons.recording.needs import text_of

    def needs(planned: LoadedModel) -> list[Need]:
        if material.corpus is None or method.name not in ("keyed", "bake"):
            return [writing_need(planned, "plan")]
        learn = [learning_need(planned)] if getattr(method, "learn", False) else []
        text = text_of(planned, material.corpus)
        return [key_need(planned, text, material.blocks or ("mlp",)), *learn]

    dry_run(screen, asked.model, asked.device, asked.dtype, needs)


def _of_plans(asked: SimpleNamespace, operation: str) -> tuple[Plan, ModelSource | None]:
    """Plans composed, inverted or restricted."""
    from editing.plans.algebra import compose, inverted, restricted
    from editing.plans.plan import load_plan
    from neurons.errors import UsageError
    from neurons.models.source import open_model
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.scorers.selection import parse_layers
    from neurons.text.corpus_files import language_label

    meant = {"model", "strength", operation, "out", "as_json"}
    meant |= {"layers", "heads", "neurons", "languages"} if operation == "restrict" else set()
    for name, value in vars(asked).items():
        if name not in meant and _was_given(name, value):
            raise UsageError(f"{_spelled(name)} means nothing to --{operation}: leave it out")
    if operation == "restrict":
        if all(getattr(asked, name) is None for name in ("layers", "heads", "neurons")):
            raise UsageError("--restrict: name the --layers, --heads or --neurons that may change")
        if asked.languages is not None and asked.neurons is None:
            raise UsageError("--languages chooses among --neurons, which are not given: leave it out")
    if operation != "compose" and asked.model is None:
        raise UsageError(f"--{operation} needs MODEL, the one that the plan was made for")
    if operation == "compose" and len(asked.compose) == 1 and asked.strength is None:
        raise UsageError("--compose: name two plans or more, or a --strength for the one")
    source = None if asked.model is None else open_model(asked.model)
    if operation == "compose":
        plan = compose([load_plan(path) for path in asked.compose], source)
    elif operation == "invert":
        assert source is not None
        plan = inverted(source, load_plan(asked.invert))
    else:
        assert source is not None
        layers = None if asked.layers is None else parse_layers(asked.layers, source.anatomy.layers)
        components: dict[int, dict[str, Any]] | None = None
        if asked.heads is not None or asked.neurons is not None:
            components = {layer: {} for layer in range(source.anatomy.layers)}
            for own in components.values():
                if asked.heads is not None:
                    own["attn"] = parse_layers(asked.heads, source.anatomy.heads, "heads")
            if asked.neurons is not None:
                neurons = load_neuron_set(asked.neurons)
                neurons.require_model(source)
                languages = [*map(language_label, asked.languages or ())] or neurons.languages
                for layer, own in components.items():
                    own["mlp"] = {
                        neuron
                        for language in languages
                        for neuron in neurons.by_layer(language)[layer].tolist()
                    }
        plan = restricted(source, load_plan(asked.restrict), layers, components)
    return plan if asked.strength is None else plan.scaled(asked.strength), source


def _keep_inputs(asked: SimpleNamespace) -> None:
    """Refuse an --out that would replace a file that the plan is made of."""
    from neurons.errors import UsageError

    for name in ("directions", "vector", "neurons", "statistics", "compose", "invert", "restrict"):
        given = getattr(asked, name)
        for path in given if isinstance(given, tuple) else (given,):
            if path is not None and asked.out.exists() and path.samefile(asked.out):
                raise UsageError(f"--out {asked.out} is what {_spelled(name)} reads: name another file")


def _refuse_foreign(asked: SimpleNamespace, method: type[Method]) -> None:
    """An option that a method would not look at is an error, not a silence; one that it needs must be there."""
    from neurons.errors import UsageError

    fields = {"direction": "directions"}
    meant = {fields.get(name, name) for name in (*method.needs, *method.takes)}
    for name in _SHARED:
        if name not in meant and _was_given(name, getattr(asked, name)):
            raise UsageError(f"{_spelled(name)} means nothing to --method {asked.method}: leave it out")
    if asked.heads is not None:
        raise UsageError("--heads is for --restrict")
    for name in SPELLED_OUT:
        if getattr(asked, name) is not None and name not in method.settings():
            raise UsageError(f"{_spelled(name)} means nothing to --method {asked.method}: leave it out")
    for need in method.needs:
        if not _was_given(fields.get(need, need), getattr(asked, fields.get(need, need))):
            raise UsageError(f"--method {asked.method} needs {_spelled(need)} ({_WHERE_FROM[need]})")
    if asked.part is not None and asked.corpus is None:
        raise UsageError("--part chooses lines of --corpus, which is not given: leave it out")


_SHARED = (
    "directions",
    "vector",
    "neurons",
    "statistics",
    "corpus",
    "languages",
    "part",
    "layers",
    "blocks",
    "strength",
    "device",
    "dtype",
)
_WHERE_FROM = {
    "direction": "from `broca direction`",
    "corpus": "a directory of <language>.txt with every language that matters",
    "neurons": "from `broca identify`",
    "languages": "as en,fr",
}


def _spelled(name: str) -> str:
    names = {"model": "MODEL", "directions": "--direction", "assignments": "--set", "as_json": "--json"}
    return names.get(name, "--" + name.replace("_", "-"))


def _was_given(name: str, value: Any) -> bool:
    """Whether the user wrote an option, be it with the value that it has by default."""
    from click.core import ParameterSource

    source = click.get_current_context().get_parameter_source(name)
    return value not in (None, ()) and source is ParameterSource.COMMANDLINE


def _list(screen: Screen) -> None:
    from editing.study.registry import edits

    screen.table(
        "methods",
        ["method", "what it does", "source", "needs"],
        [[name, method.line, method.source, method.inputs()] for name, method in edits().items()],
        words=4,
    )
    screen.table(
        "settings (--set name=value)",
        ["method", "setting", "what it does", "default"],
        [
            [name, key, setting.line, "-" if setting.default in (None, ()) else str(setting.default)]
            for name, method in edits().items()
            for key, setting in method.settings().items()
        ],
        words=4,
    )
    screen.result(
        {
            name: {
                "line": method.line,
                "source": method.source,
                "needs": list(method.needs),
                "takes": list(method.takes),
                "settings": {key: setting.default for key, setting in method.settings().items()},
            }
            for name, method in edits().items()
        }
    )


def _show(screen: Screen, plan: Plan, source: ModelSource | None, asked: SimpleNamespace) -> None:
    from editing.plans.plan_warnings import plan_warnings

    plan_table(screen, plan, None if source is None else source.anatomy)
    if plan.relative_change() is None:
        screen.say("give MODEL to see how large the changes are beside its weights")
    warnings = plan_warnings(plan)
    for warning in warnings:
        screen.warn(warning)
    screen.result(
        {
            "out": asked.out,
            "method": plan.metadata["method"],
            "components": plan.components,
            "relative_change": plan.relative_change(),
            "warnings": warnings,
            "modules": [
                {"layer": edit.layer, "block": edit.block, "rank": edit.rank, **edit.notes}
                for edit in plan.edits
            ],
        },
        asked.out,
    )
