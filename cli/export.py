"""``broca export``: the permanently steered checkpoint, the way back from it, and a checkpoint made editable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import FINITE, IN_FILE, json_option, model_argument, out_option
from cli.screen import Screen

if TYPE_CHECKING:
    from editing.plans.plan import Plan


@click.command("export")
@model_argument
@click.option("--edit", "edit_path", type=IN_FILE, help="A plan, from `broca edit` or `broca diff`.")
@click.option("--undo", is_flag=True, help="Restore the base of MODEL, exported with --undoable, to the bit.")
@click.option(
    "--dequantise",
    type=click.Choice(["bf16"]),
    help="Write MODEL, a checkpoint of FP8 blocks, unquantised, so that it can be edited.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["checkpoint", "lora"]),
    default="checkpoint",
    show_default=True,
    help="checkpoint: the whole model; lora: an adapter for PEFT and vLLM on top of MODEL.",
)
@click.option("--strength", type=FINITE, help="Multiplies the edit, on top of the plan's own.  [default: 1]")
@click.option("--verify", is_flag=True, help="Read every tensor back and compare it with MODEL and plan.")
@click.option("--undoable", is_flag=True, help="Keep what the rounding takes, for --undo.")
@click.option("--push-to-hub", "repo", metavar="REPO", help="Upload the result as this hub repository.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@out_option("Directory for the checkpoint.", directory=True)
@json_option
def command(
    model: str,
    edit_path: Path | None,
    undo: bool,
    dequantise: str | None,
    form: str,
    strength: float | None,
    verify: bool,
    undoable: bool,
    repo: str | None,
    overwrite: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Copy the checkpoint of MODEL (hub id or directory) with a plan's tensors replaced.

    It needs as much free disk as MODEL takes and two to three times as long as copying it, and memory that
    does not grow with the model; --verify reads all of it once more.  An adapter is small and done at once.

    \b
    Examples:
      broca export artifacts/demo/model --edit edit.safetensors --out steered
      broca export artifacts/demo/model --edit edit.safetensors --undoable --out steered
      broca export steered --undo --out base
    """
    from editing.checkpoints.staging import check_target, place_apart

    _refuse_combinations(edit_path, undo, dequantise, form, strength, verify, undoable)
    screen = Screen(as_json)
    if repo is not None:
        from editing.checkpoints.hub import require_pushable

        require_pushable(repo)
    if undo:
        from editing.checkpoints.undo import reject_adapter

        reject_adapter(Path(model))
    if form == "checkpoint" or not out.exists():
        check_target(out, overwrite)
    if Path(model).is_dir():
        place_apart(Path(model), out)
    if edit_path is None:
        result = (
            _undone(screen, model, out, overwrite) if undo else _dequantised(screen, model, out, overwrite)
        )
    else:
        from editing.plans.plan import load_plan

        plan = load_plan(edit_path)
        if strength is not None:
            plan = plan.scaled(strength)
        if form == "lora":
            result = _adapter(screen, model, plan, out, overwrite)
        else:
            result = _exported(screen, model, plan, out, overwrite, verify, undoable)
    if repo is not None:
        from editing.checkpoints.hub import push
        from neurons.errors import BrocaError

        try:
            result["pushed"] = push(out, repo)
        except BrocaError as error:
            raise BrocaError(
                f"{out} is written, only the upload failed: {error}; then `hf upload {repo} {out}`"
            ) from error
        screen.say(result["pushed"])
    screen.result({"out": out, **result}, out)


def _refuse_combinations(
    edit_path: Path | None,
    undo: bool,
    dequantise: str | None,
    form: str,
    strength: float | None,
    verify: bool,
    undoable: bool,
) -> None:
    """One sentence for options that make no sense together."""
    from neurons.errors import UsageError

    tasks = {"--edit": edit_path is not None, "--undo": undo, "--dequantise": dequantise is not None}
    given = [name for name, there in tasks.items() if there]
    if len(given) != 1:
        found = f"{' and '.join(given)} are two tasks" if given else "nothing to do"
        raise UsageError(f"{found}: give exactly one of --edit, --undo and --dequantise")
    options = {
        "--format lora": form == "lora",
        "--strength": strength is not None,
        "--verify": verify,
        "--undoable": undoable,
    }
    for name, there in options.items():
        if there and edit_path is None:
            said = "; it compares digests in any case" if name == "--verify" and undo else ""
            raise UsageError(f"{name} means nothing to {given[0]}{said}: leave it out")
        if there and form == "lora" and name in ("--verify", "--undoable"):
            raise UsageError(f"{name} means nothing to --format lora, which changes no weights: leave it out")


def _exported(
    screen: Screen, model: str, plan: Plan, out: Path, overwrite: bool, verify: bool, undoable: bool
) -> dict[str, Any]:
    from editing.checkpoints.export import export
    from neurons.models.source import open_model

    source = open_model(model)
    with screen.copying("Writing") as tell:
        found = export(source, plan, out, overwrite, tell, verify, undoable)
    change = "" if found.relative_change is None else f", ||dW||/||W|| {found.relative_change:.3g}"
    screen.table(
        f"{len(found.tensors)} tensors, {found.components:,} components{change}",
        ["tensor", "change on disk / meant", "cosine"],
        [[name, *survived] for name, survived in found.survived.items()],
    )
    if found.added:
        screen.say(f"added {len(found.added)} biases; the config asks for them now")
    if found.verified is not None:
        screen.say(
            f"verified: {len(found.verified.edited)} tensors are source and plan bit for bit, "
            f"{found.verified.unchanged:,} are the source's byte for byte"
        )
    if found.remainder_bytes is not None:
        screen.say(f"undoable: {found.remainder_bytes:,} bytes keep what the rounding took")
    for name in found.unedited_copies:
        screen.warn(f"{out / name} still holds the unedited weights: remove it")
    verified = found.verified
    return {
        "tensors": list(found.tensors),
        "components": found.components,
        "relative_change": found.relative_change,
        "survived": {
            name: {"norm_ratio": ratio, "cosine": cosine} for name, (ratio, cosine) in found.survived.items()
        },
        "added": list(found.added),
        "unedited_copies": list(found.unedited_copies),
        "verified": None
        if verified is None
        else {"edited": len(verified.edited), "unchanged": verified.unchanged},
        "remainder_bytes": found.remainder_bytes,
    }


def _adapter(screen: Screen, model: str, plan: Plan, out: Path, overwrite: bool) -> dict[str, Any]:
    from editing.checkpoints.adapter import export_adapter
    from neurons.models.source import open_model

    found = export_adapter(open_model(model), plan, out, overwrite=overwrite)
    screen.table(
        f"an adapter of {len(found.modules)} modules, {found.components:,} components",
        ["module", "rank"],
        [[name, rank] for name, rank in found.modules.items()],
    )
    return {
        "modules": dict(found.modules),
        "components": found.components,
        "relative_change": found.relative_change,
    }


def _undone(screen: Screen, model: str, out: Path, overwrite: bool) -> dict[str, Any]:
    from editing.checkpoints.undo import undo
    from neurons.models.source import open_model

    source = open_model(model)
    with screen.copying("Restoring") as tell:
        found = undo(source, out, overwrite, tell)
    screen.say(f"restored {len(found.tensors)} tensors to the bit; fingerprint {found.fingerprint}")
    return {"tensors": list(found.tensors), "fingerprint": found.fingerprint}


def _dequantised(screen: Screen, model: str, out: Path, overwrite: bool) -> dict[str, Any]:
    from editing.checkpoints.dequantise import dequantise
    from neurons.models.source import locate

    checkpoint = locate(model)
    with screen.copying("Writing") as tell:
        found = dequantise(checkpoint, out, overwrite, tell)
    screen.say(f"{len(found.tensors)} tensors of FP8 blocks are bf16 now, {found.bytes / 1e9:.2f} GB in all")
    return {"tensors": list(found.tensors), "bytes": found.bytes}
