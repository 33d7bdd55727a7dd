"""What Broca does with every causal language model of transformers' registry, on tiny random models.

--wrappers: with every model of images and text, of which Broca edits the language model, on text alone.

For each model type it builds a random model of a few layers from the type's config class, saves it, and tries

    neurons     positive counts and means are recorded, and silencing a neuron at its site and in its weight is the same
    heads       silencing a head is the same
    experts     number of groups of neurons that tokens are routed to
    keyed edit  a plan of random rank-1 edits is exported and loaded again: the logits are those of a hook
    Steer2Edit  a plan for a random direction is exported and loaded again: the logits are those of the applied plan
    LoRA        the rank-1 edits as an adapter in PEFT: the same logits
    ablation    the loss without neurons is the loss with their columns zeroed

Each type ends in support, in one sentence of Broca's, in "no tiny model" (transformers builds none from the sizes
below) or in "unexpected error".  Each has its own process.  --table writes the table of docs/architectures.md, whose
column vLLM comes from the outcomes of tests/vllm/sweep.py (--vllm build/vllm/families.json).

    python benchmarks/architectures.py
    python benchmarks/architectures.py --types qwen3_5_text,jamba
    python benchmarks/architectures.py --table docs/architectures.md
    python benchmarks/architectures.py --wrappers --table docs/architectures.md
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from tiny_models import VOCABULARY, tiny_config, tiny_model

LIMIT_SECONDS = 600
TOLERANCE = 2e-3  # of the change of the logits
UNEXPECTED, NO_MODEL = "unexpected error", "no tiny model"


@dataclass(frozen=True)
class Outcome:
    """What came of one model type.

    Attributes:
        model_type: of the config.
        neurons: "yes", or "layers 0-1" if only some layers have them; "" if not reached.
        heads: the same, of heads.
        experts: groups of neurons a layer that tokens are routed to, as "4"; "" in a dense model.
        keyed: "yes", "heads" or "neurons" if only these, or "" if none.
        steer2edit: "yes" or "no".
        lora: as ``keyed``, or "no".
        ablation: "yes" or "".
        why: one sentence, or the error.
        kind: "supported", "refused", NO_MODEL or UNEXPECTED.
        seconds: it took.
    """

    model_type: str
    neurons: str = ""
    heads: str = ""
    experts: str = ""
    keyed: str = ""
    steer2edit: str = ""
    lora: str = ""
    ablation: str = ""
    why: str = ""
    kind: str = "supported"
    seconds: float = 0.0


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models

    words = {f"w{index}": index for index in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w1", unk_token="w0")


def outcome(model_type: str) -> Outcome:
    """Try one type; raises nothing."""
    from neurons.errors import BrocaError, first_line

    begun = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = tiny_model(tiny_config(model_type))
                ids = torch.arange(6)[None] + 2
                model(input_ids=ids, use_cache=False)
                model.save_pretrained(Path(folder) / "model")
            # Anything may go wrong in transformers here, and none of it is Broca's.
            except Exception as error:
                why = f"{type(error).__name__}: {first_line(error)}"
                return Outcome(model_type, why=why, kind=NO_MODEL, seconds=time.perf_counter() - begun)
            del model
            tokenizer().save_pretrained(Path(folder) / "model")
            made = _tried(model_type, Path(folder))
    except BrocaError as error:
        made = Outcome(model_type, why=_sentence(str(error)), kind="refused")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {first_line(error)} ({Path(where.filename).name}:{where.lineno})"
        made = Outcome(model_type, why=why, kind=UNEXPECTED)
    return Outcome(**{**asdict(made), "seconds": time.perf_counter() - begun})


def _sentence(message: str) -> str:
    """A message of Broca without the temporary directory."""
    return re.sub(r"/\S+/model: ", "", message)


def _tried(model_type: str, folder: Path) -> Outcome:
    from neurons.models.source import load_model, open_model

    source = open_model(folder / "model")
    loaded = load_model(folder / "model", device="cpu")
    anatomy = loaded.anatomy
    _same_figures(source.anatomy, anatomy)
    layers_of = {
        block: [layer for layer in range(anatomy.layers) if anatomy.has(layer, block)]
        for block in ("attn", "mlp")
    }
    means = _record(loaded)
    _ablate(loaded, layers_of["mlp"])
    for block, layers in layers_of.items():
        for layer in layers:
            _silence(loaded, layer, block)
    said = _lacking(anatomy, layers_of)
    steer2edit = _unless_refused(said, lambda: _steer2edit(loaded, folder, means))
    plan = _keyed(loaded, folder, layers_of)
    lora = _lora(loaded, folder, plan, said)
    return Outcome(
        model_type,
        neurons=_which(layers_of["mlp"], anatomy.layers),
        heads=_which(layers_of["attn"], anatomy.layers),
        experts=str(anatomy.experts) if anatomy.mixed else "",
        keyed=_where(plan),
        steer2edit=steer2edit,
        lora=lora,
        ablation="yes" if layers_of["mlp"] else "",
        why="; ".join(dict.fromkeys(said)),
    )


def _unless_refused(said: list[str], attempt: Callable[[], None]) -> str:
    """ "yes", or "no" with what Broca says."""
    from neurons.errors import BrocaError

    try:
        attempt()
    except BrocaError as error:
        said.append(_sentence(str(error)))
        return "no"
    return "yes"


def _lacking(anatomy: Any, layers_of: dict[str, list[int]]) -> list[str]:
    """What Broca says of the layers without heads or neurons."""
    from neurons.errors import UsageError

    said = []
    for block in layers_of:
        try:
            anatomy.require(block, range(anatomy.layers))
        except UsageError as error:
            said.append(str(error))
    return said


def _which(layers: list[int], depth: int) -> str:
    if len(layers) == depth:
        return "yes"
    return f"layers {', '.join(map(str, layers))} of {depth}" if layers else "no"


def _same_figures(opened: Any, loaded: Any) -> None:
    for name in ("layers", "residual", "neurons", "heads", "head_dim", "experts", "expert_width", "gated"):
        if getattr(opened, name) != getattr(loaded, name):
            raise AssertionError(f"{name}: {getattr(opened, name)} opened, {getattr(loaded, name)} loaded")


def _batch() -> Any:
    from neurons.text.batches import TokenBatch

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=generator)
    seen = torch.ones_like(ids, dtype=torch.bool)
    counted = seen.clone()
    counted[:, 0] = False
    return TokenBatch(ids, seen, counted, torch.arange(2))


def _record(loaded: Any) -> dict[str, torch.Tensor]:
    """The means [L, width] at the inputs of the output modules."""
    from neurons.recording.record import record

    read = ["mlp_act:positive", "mlp_in:sum", "mlp_in:text_mean", "attn_in:text_mean"]
    statistics = record(loaded, {"xx": [_batch()]}, read)
    for layer in range(loaded.anatomy.layers):
        if loaded.anatomy.has(layer, "mlp"):
            assert bool(statistics.moments["mlp_in:sum"][layer].any()), f"layer {layer}: nothing is recorded"
    return {site: statistics.text_mean(site)[..., 0].double() for site in ("attn_in", "mlp_in")}


def _logits(loaded: Any, ids: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = loaded.model(input_ids=ids, use_cache=False).logits.double()
    return made


def _hooks_of(loaded: Any) -> dict[tuple[str, int], Any]:
    """Hooks that change nothing, so that a mixture always computes its experts in the same way."""
    from neurons.ablation.conditions import _no_op_hooks

    return _no_op_hooks(loaded)


def _near(one: torch.Tensor, other: torch.Tensor, plain: torch.Tensor, what: str) -> None:
    change = (one - plain).abs().max()
    if not bool(change > 0):
        raise AssertionError(f"{what} changes nothing")
    if not bool((one - other).abs().max() <= TOLERANCE * change):
        raise AssertionError(f"{what}: off by {float((one - other).abs().max() / change):.2g} of the change")


def _silence(loaded: Any, layer: int, block: str) -> None:
    from neurons.architectures.self_check import check_silence

    for part in loaded.anatomy.parts(layer, block):
        check_silence(loaded.model, loaded.anatomy, layer, block, part, _batch().ids)


def _ablate(loaded: Any, layers: list[int]) -> None:
    """Ablate three neurons of the last layer that has any."""
    from neurons.ablation.conditions import Condition, condition_losses

    if not layers:
        return
    rows = torch.tensor([[layers[-1], neuron] for neuron in (0, 1, 5)])
    losses = condition_losses(
        loaded, {"xx": [_batch()]}, [Condition(torch.zeros(0, 2, dtype=torch.int64)), Condition(rows)]
    )
    with ExitStack() as undo:
        for layer, neuron in rows.tolist():
            value = loaded.anatomy.value(layer, neuron)
            undo.callback(value.copy_, value.clone())
            value.zero_()
        zeroed = condition_losses(
            loaded, {"xx": [_batch()]}, [Condition(torch.zeros(0, 2, dtype=torch.int64))]
        )
    by_hook, by_weight = losses.sums["xx"][:, 1], zeroed.sums["xx"][:, 0]
    if not torch.allclose(by_hook, by_weight, rtol=1e-4):
        raise AssertionError(f"ablation gives {by_hook.tolist()}, zeroed weights {by_weight.tolist()}")


def _steer2edit(loaded: Any, folder: Path, means: dict[str, torch.Tensor]) -> None:
    """Export Steer2Edit's plan for a random direction, and compare the logits with the applied plan."""
    from editing.checkpoints.export import export
    from editing.directions.direction import Direction
    from editing.methods.steer2edit import steer2edit_plan
    from editing.plans.applied import applied
    from neurons.models.source import load_model

    anatomy, generator = loaded.anatomy, torch.Generator().manual_seed(2)
    shape = anatomy.layers, anatomy.residual
    vectors = {
        site: torch.randn(shape, generator=generator, dtype=torch.float64) for site in ("attn_out", "mlp_out")
    }
    direction = Direction("xx", "yy", vectors, means, {"fingerprint": loaded.fingerprint})
    plan = steer2edit_plan(loaded, direction, range(anatomy.layers), heads_rho=0.1, neurons_rho=0.1, alpha=0)
    ids = _batch().ids
    plain = _logits(loaded, ids)
    with applied(loaded, plan):
        by_plan = _logits(loaded, ids)
    export(loaded, plan, folder / "steered")
    _near(by_plan, _logits(load_model(folder / "steered", device="cpu"), ids), plain, "Steer2Edit")


def _lora(loaded: Any, folder: Path, plan: Any, said: list[str]) -> str:
    """Load the plan as an adapter, or its edits of heads if Broca refuses those of neurons.

    The model has the adapter afterwards.
    """
    import peft

    from editing.checkpoints.adapter import export_adapter
    from editing.methods.added_values import adding, values_of
    from editing.plans.plan import make_plan
    from neurons.architectures.sites import site_hooks
    from neurons.errors import BrocaError

    heads = make_plan([edit for edit in plan.edits if edit.block == "attn"], plan.metadata)
    for tried in (plan, heads):
        try:
            export_adapter(loaded, tried, folder / "adapter")
        except BrocaError as error:
            said.append(_sentence(str(error)))
            continue
        ids = _batch().ids
        with site_hooks(loaded.anatomy, _hooks_of(loaded)):
            plain = _logits(loaded, ids)
            with adding(loaded, tried, values_of(tried)):
                by_hook = _logits(loaded, ids)
            adapted = peft.PeftModel.from_pretrained(loaded.model, folder / "adapter").eval()
            made = adapted(input_ids=ids, use_cache=False).logits.double()
        _near(by_hook, made, plain, "the adapter")
        return _where(tried)
    return "no"


def _where(plan: Any) -> str:
    done = {edit.block for edit in plan.edits}
    return "yes" if len(done) == 2 else "heads" if "attn" in done else "neurons"


def _keyed(loaded: Any, folder: Path, layers_of: dict[str, list[int]]) -> Any:
    """Export a plan of random rank-1 edits wherever a key is possible, and compare the logits with hooks."""
    from editing.checkpoints.export import export
    from editing.methods.added_values import adding, values_of
    from editing.plans.plan import ModuleEdit, make_plan
    from neurons.architectures.sites import site_hooks
    from neurons.models.source import load_model

    anatomy, generator = loaded.anatomy, torch.Generator().manual_seed(1)
    edits = []
    for block, layers in layers_of.items():
        for layer in layers:
            part = anatomy.common(layer, block)
            if part is None:
                continue
            width = anatomy.width(f"{block}_in", layer)
            left = torch.randn(anatomy.residual, 1, generator=generator)
            right = torch.zeros(width, 1)
            right[part.columns] = torch.randn(part.width, 1, generator=generator) / part.width
            components = tuple(range(width // anatomy.component_width(block, layer)))
            notes = {"change_norm": float(left.norm() * right.norm()), "weight_norm": 1.0}
            edits.append(ModuleEdit(layer, block, components, left=left, right=right, notes=notes))
    metadata = {
        "fingerprint": loaded.fingerprint,
        "model": loaded.label,
        "method": "keyed",
        "source": "xx",
        "target": "yy",
        "settings": {},
    }
    plan = make_plan(edits, metadata)
    export(loaded, plan, folder / "edited")
    edited = load_model(folder / "edited", device="cpu")
    ids = _batch().ids
    # With hooks that change nothing, so that experts always compute in the same way.
    with site_hooks(anatomy, _hooks_of(loaded)):
        plain = _logits(loaded, ids)
        with adding(loaded, plan, values_of(plan)):
            by_hook = _logits(loaded, ids)
    with site_hooks(edited.anatomy, _hooks_of(edited)):
        _near(by_hook, _logits(edited, ids), plain, "the edit")
    return plan


def _child(pipe: Connection, model_type: str) -> None:
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        pipe.send(asdict(outcome(model_type)))


def outcomes(types: list[str], at_once: int) -> Iterator[Outcome]:
    """The outcome of each type, in its own forked process, as they finish."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _preload()
    fork = multiprocessing.get_context("fork")
    waiting, running = list(types), []
    while waiting or running:
        while waiting and len(running) < at_once:
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_child, args=(theirs, waiting[0]))
            process.start()
            theirs.close()
            running.append((waiting.pop(0), process, ours, time.monotonic()))
        multiprocessing.connection.wait([pipe for _, _, pipe, _ in running], timeout=1)
        for item in list(running):
            model_type, process, pipe, begun = item
            late = time.monotonic() - begun > LIMIT_SECONDS
            if not pipe.poll() and process.is_alive() and not late:
                continue
            try:
                yield Outcome(**pipe.recv()) if pipe.poll() else _died(model_type, late)
            except EOFError:
                yield _died(model_type, late)
            process.kill()
            process.join()
            running.remove(item)


def _died(model_type: str, late: bool) -> Outcome:
    why = f"no answer in {LIMIT_SECONDS} s" if late else "its process died"
    return Outcome(model_type, why=why, kind=UNEXPECTED)


def _preload() -> None:
    """Import what every process needs before they fork."""
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401

    import editing.checkpoints.adapter
    import editing.checkpoints.export
    import editing.methods.steer2edit  # noqa: F401
    import neurons.ablation.conditions
    import neurons.recording.record  # noqa: F401


def registry() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def registry_of_wrappers() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def merged(made: Sequence[Outcome], path: Path | None) -> list[Outcome]:
    """The outcomes and those of other types in a file, by type."""
    before = json.loads(path.read_text()) if path is not None and path.exists() else []
    by_type = {row["model_type"]: Outcome(**row) for row in before} | {one.model_type: one for one in made}
    return [by_type[name] for name in sorted(by_type)]


def summary(made: Sequence[Outcome]) -> str:
    kinds = [one.kind for one in made]
    whole = [one for one in made if one.neurons not in ("", "no") and one.ablation and one.keyed]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return f"{len(made)} model types: {counted}; {len(whole)} with neurons, ablation and keyed edit"


def table_of(made: Sequence[Outcome], served: Mapping[str, str]) -> str:
    """Markdown: the supported types, then the others with what Broca or transformers says.

    Args:
        made: one for each model type.
        served: model type -> its outcome in vLLM; types without an entry were not tried.
    """
    cells = [
        [
            one.model_type,
            one.neurons,
            one.heads,
            one.experts,
            one.keyed or "no",
            one.steer2edit,
            one.lora,
            one.ablation or "no",
            {"served": "yes", "no tiny model": "", "": ""}.get(served.get(one.model_type, ""), "no"),
            one.why,
        ]
        for one in made
        if one.kind == "supported"
    ]
    heading = ["model type", "neurons", "heads", "experts", "keyed edit", "Steer2Edit", "LoRA", "ablation"]
    heading += ["vLLM", "remarks"]
    others = [
        [one.model_type, one.kind, one.why.replace("|", "\\|")] for one in made if one.kind != "supported"
    ]
    return "\n\n".join(
        [f"{summary(made)}.", _markdown(heading, cells), _markdown(["model type", "outcome", "why"], others)]
    )


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows])


def write_table(made: Sequence[Outcome], page: Path, begin: str, served: Mapping[str, str]) -> None:
    """Replace what is between the mark ``begin`` of the page and the next end."""
    end = "<!-- end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n{table_of(made, served)}\n{end}{after}", encoding="utf-8")


@click.command()
@click.option("--types", help="model types, separated by commas; default: the whole registry")
@click.option("--at-once", default=1, show_default=True, help="processes")
@click.option("--out", type=Path, help="JSON of the outcomes; those of other types in it stay")
@click.option("--table", type=Path, help="Markdown page whose generated part is replaced")
@click.option("--vllm", type=Path, help="JSON of the outcomes of tests/vllm/sweep.py")
@click.option("--wrappers", is_flag=True, help="the registry of models of images and text")
def main(
    types: str | None, at_once: int, out: Path | None, table: Path | None, vllm: Path | None, wrappers: bool
) -> None:
    """Try every model type."""
    made = []
    whole = registry_of_wrappers() if wrappers else registry()
    for result in outcomes(types.split(",") if types else whole, at_once):
        made.append(result)
        row = (result.kind, result.neurons, result.heads, result.experts, result.keyed)
        row += (result.steer2edit, result.lora, result.ablation)
        click.echo(f"{result.model_type:24} {' | '.join(row)}  [{result.seconds:.1f} s]  {result.why}")
        if out is not None:
            out.write_text(json.dumps([asdict(one) for one in merged(made, out)], indent=1) + "\n")
    made = merged(made, out)
    click.echo(summary(made))
    if table is not None:
        swept = [] if vllm is None else json.loads(vllm.read_text(encoding="utf-8"))
        served = {row["model_type"]: row["kind"] for row in swept}
        write_table(made, table, "<!-- wrappers -->" if wrappers else "<!-- generated -->", served)


if __name__ == "__main__":
    main()
