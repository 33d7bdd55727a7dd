"""``broca export``: write an edited checkpoint or adapter, undo an edit, dequantise a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.screen import Screen

if TYPE_CHECKING:
    from editing.plans.plan import Plan


@click.command("export")
@opt.model
@click.option("--edit", "edit_path", type=opt.IN_FILE, help="A plan, from `broca edit` or `broca diff`.")
@click.option(
    "--undo", is_flag=True, help="Restore the exact base of MODEL, which was exported with --undoable."
)
@click.option(
    "--dequantise",
    type=click.Choice(["bf16"]),
    help="Write MODEL, an FP8 or MXFP4 checkpoint, unquantised, so that a plan can be made for it.",
)
@click.option(
    "--format", "form", type=click.Choice(["checkpoint", "lora"]), default="checkpoint", show_default=True,
    help="checkpoint: the whole model; lora: an adapter on MODEL for PEFT and vLLM.",
)  # fmt: skip
@click.option("--strength", type=opt.FINITE, help="Factor of the edit.  [default: 1]")
@click.option("--verify", is_flag=True, help="Read every tensor back and compare it with MODEL and the plan.")
@click.option("--undoable", is_flag=True, help="Store the rounding errors, for --undo.")
@click.option(
    "--push-to-hub",
    "repo",
    metavar="REPO",
    help="Upload the result to this hub repository, in place of its weights.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@opt.out("Directory for the checkpoint.", directory=True)
@opt.json
def command(**options: Any) -> None:
    """Copy the checkpoint of MODEL (hub id or directory) with the tensors of a plan edited.

    It needs as much disk as MODEL and takes two to three times as long as copying it, in constant memory; --verify
    reads everything once more.  An adapter is small and takes seconds.  An FP8 checkpoint takes the plan of its
    unquantised copy, and stays FP8.

    \b
    Examples:
      broca export artifacts/demo/model --edit edit.safetensors --out steered
      broca export artifacts/demo/model --edit edit.safetensors --undoable --out steered
      broca export steered --undo --out base
    """
    from editing.checkpoints.adapter import CONFIG
    from editing.checkpoints.staging import check_target, place_apart

    arguments = SimpleNamespace(**options)
    model, out, repo = arguments.model, arguments.out, arguments.repo
    _check_combinations(arguments)
    screen = Screen(arguments.as_json)
    if repo is not None:
        from editing.checkpoints.hub import require_pushable

        require_pushable(repo)
    if arguments.undo:
        from editing.checkpoints.undo import reject_adapter

        reject_adapter(Path(model))
    check_target(out, arguments.overwrite, CONFIG if arguments.form == "lora" else "config.json")
    if Path(model).is_dir():
        place_apart(Path(model), out)
    if arguments.edit_path is None:
        write = _undone if arguments.undo else _dequantised
        result = write(screen, model, out, arguments.overwrite)
    else:
        from editing.plans.plan import load_plan

        plan = load_plan(arguments.edit_path)
        if arguments.strength is not None:
            plan = plan.scaled(arguments.strength)
        result = (_adapter if arguments.form == "lora" else _exported)(screen, plan, arguments)
    if repo is not None:
        from editing.checkpoints.hub import push, upload_command
        from neurons.errors import BrocaError

        try:
            result["pushed"] = push(out, repo)
        except BrocaError as error:
            raise BrocaError(
                f"{out} is written, but the upload failed: {error}; then run `{upload_command(out, repo)}`"
            ) from error
        screen.say(result["pushed"])
    screen.result(out=out, **result)


def _check_combinations(arguments: SimpleNamespace) -> None:
    from neurons.errors import UsageError

    edit, lora = arguments.edit_path is not None, arguments.form == "lora"
    tasks = {"--edit": edit, "--undo": arguments.undo, "--dequantise": arguments.dequantise is not None}
    given = [name for name, is_given in tasks.items() if is_given]
    if len(given) != 1:
        problem = f"{' and '.join(given)} exclude each other" if given else "nothing to do"
        raise UsageError(f"{problem}: give exactly one of --edit, --undo and --dequantise")
    options = {
        "--format lora": lora,
        "--strength": arguments.strength is not None,
        "--verify": arguments.verify,
        "--undoable": arguments.undoable,
    }
    for name, is_given in options.items():
        if is_given and not edit:
            note = ", which always compares digests" if name == "--verify" and arguments.undo else ""
            raise UsageError(f"{name} is not supported by {given[0]}{note}: leave it out")
        if is_given and lora and name in ("--verify", "--undoable"):
            raise UsageError(f"{name} is not supported by --format lora: leave it out")


def _exported(screen: Screen, plan: Plan, arguments: SimpleNamespace) -> dict[str, Any]:
    from editing.checkpoints.dequantise import open_for_export
    from editing.checkpoints.export import export

    source, out = open_for_export(arguments.model), arguments.out
    with screen.copying("Writing") as progress:
        exported = export(
            source, plan, out, arguments.overwrite, progress, arguments.verify, arguments.undoable
        )
    change = "" if exported.relative_change is None else f", ||dW||/||W|| {exported.relative_change:.3g}"
    screen.table(
        f"{len(exported.tensors)} tensors, {exported.components:,} components{change}",
        ["tensor", "stored / exact change", "cosine"],
        [[name, *survived] for name, survived in exported.survived.items()],
    )
    if exported.added:
        screen.say(f"added {len(exported.added)} biases and enabled them in config.json")
    if exported.verified is not None:
        screen.say(
            f"verified: {len(exported.verified.edited)} tensors equal source and plan exactly, "
            f"{exported.verified.unchanged:,} equal the source"
        )
    if exported.remainder_bytes is not None:
        screen.say(f"undoable: {exported.remainder_bytes:,} bytes of rounding errors are stored")
    for warning in exported.warnings:
        screen.warn(warning)
    verified = exported.verified
    return {
        "tensors": list(exported.tensors),
        "components": exported.components,
        "relative_change": exported.relative_change,
        "survived": {
            name: {"norm_ratio": ratio, "cosine": cosine}
            for name, (ratio, cosine) in exported.survived.items()
        },
        "added": list(exported.added),
        "unedited_copies": list(exported.unedited_copies),
        "left_out": list(exported.left_out),
        "verified": None
        if verified is None
        else {"edited": len(verified.edited), "unchanged": verified.unchanged},
        "remainder_bytes": exported.remainder_bytes,
    }


def _adapter(screen: Screen, plan: Plan, arguments: SimpleNamespace) -> dict[str, Any]:
    from editing.checkpoints.adapter import export_adapter
    from neurons.models.source import open_model

    source = open_model(arguments.model)
    exported = export_adapter(source, plan, arguments.out, overwrite=arguments.overwrite)
    screen.table(
        f"adapter of {len(exported.modules)} modules, {exported.components:,} components",
        ["module", "rank"],
        [[name, rank] for name, rank in exported.modules.items()],
    )
    return {
        "modules": dict(exported.modules),
        "components": exported.components,
        "relative_change": exported.relative_change,
    }


def _undone(screen: Screen, model: str, out: Path, overwrite: bool) -> dict[str, Any]:
    from editing.checkpoints.undo import undo
    from neurons.models.source import open_model

    source = open_model(model)
    with screen.copying("Restoring") as progress:
        restored = undo(source, out, overwrite, progress)
    screen.say(f"restored {len(restored.tensors)} tensors exactly; fingerprint {restored.fingerprint}")
    return {"tensors": list(restored.tensors), "fingerprint": restored.fingerprint}


def _dequantised(screen: Screen, model: str, out: Path, overwrite: bool) -> dict[str, Any]:
    from editing.checkpoints.dequantise import dequantise
    from neurons.models.source import locate

    checkpoint = locate(model)
    with screen.copying("Writing") as progress:
        written = dequantise(checkpoint, out, overwrite, progress)
    for name in written.left_out:
        screen.warn(f"{name} is left out: vLLM would serve these quantised weights")
    screen.say(f"converted {len(written.tensors)} tensors to bf16, {written.bytes / 1e9:.2f} GB in total")
    return {"tensors": list(written.tensors), "bytes": written.bytes, "left_out": list(written.left_out)}
