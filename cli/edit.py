"""``broca edit``: a plan from a direction, a vector, a neuron set or other plans."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter, methodcaller
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.corpora import noted_corpus, read_table
from cli.screen import Screen
from cli.tables import list_methods, modules_as_json, plan_table

if TYPE_CHECKING:
    from editing.methods.material import Material
    from editing.methods.method import Method
    from editing.plans.plan import Plan
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel, ModelSource

# Settings of a method that have their own option.
SETTING_OPTIONS = ("heads_rho", "neurons_rho", "alpha", "eps", "factor")


@click.command("edit", cls=opt.MultiValueCommand)
@click.argument("model", required=False)
@opt.method("edit", "keyed")
@click.option(
    "--direction", "directions", type=opt.IN_FILE, multiple=True, help="Direction, from `broca direction`."
)
@click.option(
    "--vector",
    type=opt.IN_FILE,
    help="bake: steering vectors of another library (.safetensors, .gguf, .pt or .npy).",
)
@click.option(
    "--neurons",
    type=opt.IN_FILE,
    help="Neuron set, from `broca identify`; restricts the edit, or is what the method edits.",
)
@click.option(
    "--statistics", type=opt.IN_FILE, help="clas, austeer, steer-router: statistics, from `broca record`."
)
@click.option(
    "--corpus",
    type=opt.IN_PATH,
    help="Text, as for `broca direction`; keyed: source, target and all languages to keep; bake and biprojected ablate: neutral text.",
)
@click.option(
    "--languages",
    type=opt.CommaSeparated(),
    help="Languages of the corpus, or of the neuron set without a corpus.  [default: all]",
)
@click.option("--part", type=click.Choice(opt.PARTS), help="Lines of the corpus to read.  [default: all]")
@opt.roles
@click.option("--layers", help="Layers to edit, as 1-3 or 1,2,5.  [default: as the method sets]")
@click.option(
    "--blocks",
    type=opt.CommaSeparated(),
    help="Modules to edit: attn, mlp or both.  [default: as the method sets]",
)
@click.option(
    "--strength",
    type=opt.FINITE,
    help="keyed, keyed-experts: the total shift over all layers, in multiples of the direction; otherwise a factor of "
    "the edit.  [default: 3.5 for these two, otherwise 1]",
)
@click.option(
    "--heads-rho",
    metavar="NUMBER",
    help="steer2edit: penalty on heads; off if only --neurons-rho is given.  [default: 0.3]",
)
@click.option(
    "--neurons-rho",
    metavar="NUMBER",
    help="steer2edit: penalty on neurons; off if only --heads-rho is given.  [default: 0.9]",
)
@click.option("--alpha", metavar="NUMBER", help="steer2edit: sparsity in [0, 1).  [default: 0.2]")
@click.option(
    "--eps", metavar="NUMBER", help="keyed, bake: ridge, as a fraction of the mean variance.  [default: 0.01]"
)
@click.option("--factor", metavar="NUMBER", help="scale: 0 ablates, 2 doubles.")
@click.option(
    "--compose", type=opt.IN_FILE, multiple=True, metavar="EDIT...", help="Plans to apply in sequence."
)
@click.option("--invert", type=opt.IN_FILE, metavar="EDIT", help="A plan to invert; needs MODEL.")
@click.option(
    "--restrict",
    type=opt.IN_FILE,
    metavar="EDIT",
    help="A plan to restrict to --layers, --heads and --neurons; needs MODEL.",
)
@click.option(
    "--convert",
    type=opt.IN_FILE,
    metavar="FACTORS",
    help="Rank-1 factors that Steer2Edit's code saved (.pt), as a plan; needs MODEL.",
)
@click.option("--heads", help="--restrict: heads to keep in the plan, as 0,3.")
@opt.tokens
@opt.device
@opt.dry_run
@click.option("--out", type=opt.OUT_FILE, help="File for the plan (.safetensors).")
@opt.json
def command(**options: Any) -> None:
    """Make a plan of weight edits for MODEL (hub id or directory).

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
      broca edit artifacts/demo/model --convert factors.pt --out edit.safetensors
      broca edit --method list
    """
    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    if arguments.method == opt.LIST:
        from editing.study.registry import edits

        lists = {"needs": attrgetter("needs"), "takes": attrgetter("takes")}
        list_methods(screen, edits(), {"needs": methodcaller("inputs")}, lists)
        return
    from neurons.errors import UsageError

    if arguments.out is None:
        raise UsageError("--out is missing: give the file for the plan")
    operations = [name for name in ("compose", "invert", "restrict", "convert") if getattr(arguments, name)]
    if len(operations) > 1:
        raise UsageError(f"--{' and --'.join(operations)} exclude each other: use one at a time")
    made = _from_plans(arguments, operations[0]) if operations else _by_method(screen, arguments)
    if made is None:
        return
    plan, source = made
    plan.save(arguments.out)
    _show(screen, plan, source, arguments)


def _by_method(screen: Screen, arguments: SimpleNamespace) -> tuple[Plan, ModelSource] | None:
    from editing.directions.direction import load_direction
    from editing.methods.material import Material
    from editing.methods.scope import chosen_modules
    from editing.study.registry import edit_named
    from neurons.errors import UsageError
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.scorers.selection import parse_layers
    from neurons.setting import assigned, read_settings
    from neurons.statistics.statistics import load_statistics
    from neurons.text.corpus_files import language_label

    method = edit_named(arguments.method)
    if arguments.model is None:
        raise UsageError("MODEL is missing: give a hub id or a directory")
    _check_options(arguments, method)
    if arguments.blocks is not None:
        chosen_modules(arguments.blocks)
    options = {name: value for name in SETTING_OPTIONS if (value := getattr(arguments, name)) is not None}
    option_texts = {name: f"{opt.option_name(name)} {value}" for name, value in options.items()}
    assignments = {**options, **assigned(arguments.assignments, tuple(options))}
    settings = read_settings(method.settings(), assignments, option_texts)
    if arguments.strength is not None:
        settings["strength"] = arguments.strength
    edit_method = method(**settings)
    labels = None if arguments.languages is None else tuple(map(language_label, arguments.languages))
    material = Material(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        directions=tuple(load_direction(path) for path in arguments.directions),
        vector=arguments.vector,
        neurons=None if arguments.neurons is None else load_neuron_set(arguments.neurons),
        statistics=None if arguments.statistics is None else load_statistics(arguments.statistics),
        corpus=None
        if arguments.corpus is None
        else replace(noted_corpus(screen, arguments, method.min_languages), tokens=arguments.tokens),
        languages=labels,
        blocks=arguments.blocks,
    )
    if arguments.dry_run:
        _dry_run(screen, arguments, material, edit_method)
        return None
    source = material.opened
    for path, direction in zip(arguments.directions, material.directions, strict=True):
        source.require_fingerprint(direction.metadata, path)
    if material.neurons is not None:
        material.neurons.require_model(source)
    if arguments.layers is not None:
        material.layers = parse_layers(arguments.layers, source.anatomy.layers)
    with screen.progress("Recording activations", None, "tokens") as advance:
        material.progress = advance
        plan = edit_method.plan_for(material)
    if read := plan.metadata.get("read"):
        from neurons.text.token_budget import KEYS

        read_table(screen, read, KEYS.minimum)
    return plan, source


def _dry_run(screen: Screen, arguments: SimpleNamespace, material: Material, method: Method) -> None:
    """Print the memory needs; methods that read no text load one tensor at a time."""
    from cli.dry_run import dry_run
    from editing.pipeline.needs import solving_needs, writing_need
    from neurons.recording.needs import pass_need, text_of
    from neurons.scorers.selection import parse_layers
    from neurons.text.token_budget import KEYS

    def needs(planned: LoadedModel) -> list[Need]:
        layers = None
        if arguments.layers is not None:
            layers = len(parse_layers(arguments.layers, planned.anatomy.layers))
        if material.corpus is None:
            return [writing_need(planned, "plan")]
        text = text_of(planned, material.corpus, default=KEYS.tokens)
        if not method.solves_keys:
            return [pass_need(planned, "plan", text.row, False, text.batch)]
        return solving_needs(planned, text, method, material.blocks, layers)

    dry_run(screen, arguments, needs)


def _from_plans(arguments: SimpleNamespace, operation: str) -> tuple[Plan, ModelSource | None]:
    """A plan from --compose, --invert, --restrict or --convert."""
    from editing.plans.algebra import compose, inverted, restricted
    from editing.plans.plan import load_plan
    from editing.plans.steer2edit_factors import read_factors
    from neurons.architectures.anatomy import UNITS
    from neurons.errors import UsageError
    from neurons.models.source import open_model
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.scorers.selection import parse_layers
    from neurons.text.corpus_files import language_label

    accepted = {"model", "strength", operation, "out", "as_json"}
    accepted |= {"layers", "heads", "neurons", "languages"} if operation == "restrict" else set()
    opt.refuse_options(arguments, vars(arguments).keys() - accepted, f"--{operation}")
    if operation == "restrict":
        if all(getattr(arguments, name) is None for name in ("layers", "heads", "neurons")):
            raise UsageError("--restrict needs --layers, --heads or --neurons")
        if arguments.languages is not None and arguments.neurons is None:
            raise UsageError("--languages selects from --neurons, which is not given: leave it out")
    if operation == "compose" and len(arguments.compose) == 1 and arguments.strength is None:
        raise UsageError("--compose needs two or more plans, or one plan and --strength")
    source = None if arguments.model is None else open_model(arguments.model)
    if operation == "compose":
        plan = compose([load_plan(path) for path in arguments.compose], source)
    elif source is None:
        raise UsageError(f"--{operation} needs MODEL, the model that is edited")
    elif operation == "invert":
        plan = inverted(source, load_plan(arguments.invert))
    elif operation == "convert":
        plan = read_factors(arguments.convert, source)
    else:
        layers = None if arguments.layers is None else parse_layers(arguments.layers, source.anatomy.layers)
        components: dict[int, dict[str, Any]] | None = None
        if arguments.heads is not None or arguments.neurons is not None:
            components = {layer: {} for layer in range(source.anatomy.layers)}
            for modules in components.values():
                if arguments.heads is not None:
                    modules["attn"] = parse_layers(arguments.heads, source.anatomy.heads, "heads")
            if arguments.neurons is not None:
                neurons = load_neuron_set(arguments.neurons)
                neurons.require_places(source)
                block = UNITS[neurons.unit]
                if block == "attn" and arguments.heads is not None:
                    raise UsageError("--neurons is a set of heads, as is --heads: give one of them")
                languages = [*map(language_label, arguments.languages or ())] or neurons.languages
                for layer, modules in components.items():
                    modules[block] = {
                        neuron
                        for language in languages
                        for neuron in neurons.by_layer(language)[layer].tolist()
                    }
        plan = restricted(source, load_plan(arguments.restrict), layers, components)
    return plan if arguments.strength is None else plan.scaled(arguments.strength), source


def _check_options(arguments: SimpleNamespace, method: type[Method]) -> None:
    """Reject options that the method does not use, and require those that it needs."""
    from neurons.errors import UsageError

    accepted = {"model", "method", "assignments", "dry_run", "out", "as_json"}
    accepted |= {"directions" if name == "direction" else name for name in (*method.needs, *method.takes)}
    accepted |= {"roles", "tokens"} if "corpus" in accepted else set()
    others = vars(arguments).keys() - accepted - method.settings().keys()
    opt.refuse_options(arguments, others, f"--method {arguments.method}")
    for need in method.needs:
        if not opt.is_given(arguments, "directions" if need == "direction" else need):
            raise UsageError(f"--method {arguments.method} needs --{need} ({_WHERE_FROM[need]})")
    for name, selected in (("part", "lines"), ("roles", "tokens"), ("tokens", "tokens")):
        if getattr(arguments, name) is not None and arguments.corpus is None:
            raise UsageError(f"--{name} selects {selected} of --corpus, which is not given: leave it out")


_WHERE_FROM = {
    "direction": "from `broca direction`",
    "corpus": "a directory of <language>.txt with all languages of the edit",
    "neurons": "from `broca identify`",
    "languages": "as en,fr",
}


def _show(screen: Screen, plan: Plan, source: ModelSource | None, arguments: SimpleNamespace) -> None:
    from editing.plans.plan_warnings import plan_warnings

    plan_table(screen, plan, None if source is None else source.anatomy)
    if plan.relative_change() is None:
        screen.say("give MODEL to show the changes relative to its weights")
    warnings = plan_warnings(plan)
    for warning in warnings:
        screen.warn(warning)
    screen.result(
        out=arguments.out,
        method=plan.metadata["method"],
        components=plan.components,
        relative_change=plan.relative_change(),
        read=plan.metadata.get("read"),
        warnings=warnings,
        modules=modules_as_json(plan),
    )
