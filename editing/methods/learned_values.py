"""Learned values: what the modules of a rank-1 plan write, moved until the target's text follows the source's.

A plan W_m' = W_m + v_m k_m^T of modules m keeps its keys k_m and gets other values v_m = r_m z_m, where r_m is the
root mean square of the coordinates of v_m as the plan had it.  From there Adam (arXiv 1412.6980) moves z by

    minimise over z   mean over tokens u of the rest of  -log p'(u | opening in the source, rest so far)

p' being the edited model's, every edit in its place, so that the modules share the work as they do when the
plan is used: a module above sees what those below wrote.  Openings and rests are lines of text in the source
and in the target, joined anew in every pass, so text needs no parallel.  One line in ``HELD_OUT`` of each is
not learned from: the z of the pass that makes their joints likeliest is taken, the plan's own values if no
pass betters them.  However much text there is, the first ``MOST_LINES`` lines and ``LONGEST`` tokens of a
joint are read: the work does not grow with the corpus.

Why: a difference of means says where the target's tokens lie on average.  Text has to be joined at one
point, behind the opening's last token, where the average token does not stand: the first words then are
halves of words.  The keys are not touched, so other languages are as safe as with the plan's own values.

Relatives: vectors made by gradient for a text (arXiv 2205.05124) or a behaviour (arXiv 2406.00045), and
ROME's value (arXiv 2202.05262), found by gradient for one fact behind a key in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from editing.methods.crossings import Crossing, crossing_batch, crossings, openings_and_rests
from editing.plans.plan import ModuleEdit, Plan, make_plan
from neurons.architectures.sites import Routed, SiteHook, site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.memory import batches_for
from neurons.models.next_token import token_losses
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress, forward
from neurons.text.batches import TokenBatch, block_length

# The strength at which keys over heads and neurons do best with the means (docs/keyed.md): where several
# strengths are tried, values are learned at this one and scaled.
LEARNED_AT = 2.0
PASSES = 15
RATE = 0.03  # found on the demo model, English to Arabic, with PASSES (docs/keyed.md)
ROWS_A_STEP = 32
MOST_LINES = 512
LONGEST = 256
HELD_OUT = 5
HELD_OUT_TURNS = 4  # rests that each opening kept out is tried with


@dataclass(frozen=True)
class LearnedValues:
    """What was learned.

    Attributes:
        plan: with the learned values.
        held_out: mean negative log-likelihood (nats a token) of the joints kept out: before, then after each pass.
        passes: how many the values have seen.
    """

    plan: Plan
    held_out: tuple[float, ...]
    passes: int


def enough_text(sources: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether there is something to learn from and something to keep out."""
    return _enough(*_read(sources, targets))


def learned_values(
    loaded: LoadedModel,
    plan: Plan,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    passes: int = PASSES,
    rate: float = RATE,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearnedValues:
    """Learn a plan's values from text.

    Args:
        loaded: the unedited model; its weights do not change.
        plan: every module's edit a left and a right factor of rank 1 and nothing else, as ``keyed_plan`` has it.
        sources: texts in a language where the keys speak; of several languages, mixed.
        targets: texts in the language that is to follow.
        passes: over all openings.
        rate: Adam's, of z: about how far a coordinate moves in a step, in parts of r_m.
        seed: of the order and of the joints.
        progress: called with the number of tokens of each step.

    Returns:
        The plan at its own strength; it can be scaled as the given one can.  ``metadata["learning"]`` holds
        what is beside the plan here.

    Raises:
        UsageError: too few texts to learn from some and keep others out, openings that fill the model's context,
            no pass or no rate, or a plan of another kind.
        BrocaError: a loss that is not finite, with the plan's own values or with learned ones.
    """
    openings, rests = _read(sources, targets)
    if not _enough(openings, rests):
        raise UsageError(
            f"{len(openings)} openings and {len(rests)} texts to follow them are too few to learn from: give "
            f"{2 * HELD_OUT} lines or more of each language, longer than an opening of six words"
        )
    if passes < 1 or not rate > 0:
        raise UsageError(
            f"{passes} passes at a rate of {rate} learn nothing: give 1 or more and a positive rate"
        )
    values = _values(plan)
    generator = torch.Generator().manual_seed(seed)
    size = values.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    z = (values / size).float().to(loaded.device).requires_grad_(True)
    unit = size.float().to(loaded.device)
    optimizer = torch.optim.Adam([z], lr=rate)
    own, kept_out = ((_parted(openings, out), _parted(rests, out)) for out in (False, True))
    joints = _batches(
        loaded,
        [row for turn in range(HELD_OUT_TURNS) for row in crossings(loaded.tokenizer, *kept_out, turn)],
    )

    def held_out() -> float:
        with torch.no_grad():
            losses = [float(_loss(loaded, plan, batch, z * unit)) for batch in joints]
        return sum(losses) / _tokens(joints)

    found, best = [held_out()], z.detach().clone()
    if not found[0] < float("inf"):
        raise BrocaError(
            f"{loaded.name}: the plan's own values already make the loss {found[0]}: lower its strength, or load the "
            "model in float32 (--dtype float32)"
        )
    for _ in range(passes):
        turn = int(torch.randint(len(own[1]), (), generator=generator))
        rows = crossings(loaded.tokenizer, *own, turn)
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(rows), ROWS_A_STEP):
            batches = _batches(loaded, [rows[i] for i in order[first : first + ROWS_A_STEP]])
            tokens = _tokens(batches)
            optimizer.zero_grad()
            for batch in batches:
                with torch.enable_grad():
                    (_loss(loaded, plan, batch, z * unit) / tokens).backward()
            optimizer.step()
            if progress is not None:
                progress(tokens)
        found.append(held_out())
        if not found[-1] < float("inf"):
            raise BrocaError(
                f"{loaded.name}: learned values are not finite: learn at a lower rate or in float32"
            )
        if found[-1] < min(found[:-1]):
            best = z.detach().clone()
    seen = found.index(min(found))
    learned = best.cpu().double() * size
    edits = [_with_value(edit, value) for edit, value in zip(plan.edits, learned, strict=True)]
    settings = {**plan.metadata["settings"], "learned": {"passes": passes, "rate": rate, "seed": seed}}
    metadata = {**plan.metadata, "settings": settings, "learning": {"held_out": found, "passes": seen}}
    return LearnedValues(make_plan(edits, metadata), tuple(found), seen)


def _read(sources: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """The openings of the ones and the rests of the others."""
    return openings_and_rests(sources)[0][:MOST_LINES], openings_and_rests(targets)[1][:MOST_LINES]


def _enough(openings: Sequence[str], rests: Sequence[str]) -> bool:
    return min(len(openings), len(rests)) >= 2 * HELD_OUT


def _values(plan: Plan) -> torch.Tensor:
    """float64 [modules, d]."""
    for edit in plan.edits:
        scaled = edit.row_scale is not None or edit.column_scale is not None or edit.bias is not None
        if edit.rank != 1 or scaled:
            raise UsageError(
                f"values are learned of rank-1 edits alone, and {edit.block} of layer {edit.layer} has another: "
                "make the plan by --method keyed"
            )
    return torch.stack([edit.left[:, 0].double() for edit in plan.edits if edit.left is not None])


def _with_value(edit: ModuleEdit, value: torch.Tensor) -> ModuleEdit:
    assert edit.right is not None
    # What was found for another value through a norm does not hold for this one.
    unknown = dict.fromkeys({"value_through_norm", "value_error"} & edit.notes.keys())
    change = float(value.norm() * edit.right.double().norm())
    return replace(edit, left=value[:, None].float(), notes={**edit.notes, **unknown, "change_norm": change})


def _parted(texts: Sequence[str], out: bool) -> list[str]:
    return [text for i, text in enumerate(texts) if (i % HELD_OUT == HELD_OUT - 1) == out]


def _batches(loaded: LoadedModel, rows: Sequence[Crossing]) -> list[TokenBatch]:
    """Rows in order, as many at a time as the memory holds with their gradients."""
    most = min(LONGEST, block_length(loaded.model))
    longest = min(most, max(len(row.ids) for row in rows))
    at_once = max(1, batches_for(loaded, True, longest)[0] // longest)
    return [crossing_batch(rows[i : i + at_once], most) for i in range(0, len(rows), at_once)]


def _tokens(batches: Sequence[TokenBatch]) -> int:
    """How many follow the openings."""
    found = sum(int(batch.counted[:, 1:].sum()) for batch in batches)
    if not found:
        raise UsageError(
            f"nothing follows the openings within {batches[0].ids.shape[1]} tokens: give text of shorter words, or a model "
            "of more context"
        )
    return found


def _loss(loaded: LoadedModel, plan: Plan, batch: TokenBatch, values: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods (nats) of what follows the openings."""
    batch = batch.to(loaded.device)
    wanted = batch.counted[:, 1:]
    with _edited(loaded, plan, values):
        hidden = forward(loaded.model, batch)[:, :-1][wanted]
    return token_losses(loaded.model, hidden, batch.ids[:, 1:][wanted]).sum()


@contextmanager
def _edited(loaded: LoadedModel, plan: Plan, values: torch.Tensor) -> Iterator[None]:
    """While entered, each module of the plan writes values[m] (k_m^T h) besides its own output."""
    inputs: dict[tuple[int, str], torch.Tensor] = {}

    def reader_in(edit: ModuleEdit) -> SiteHook:
        def keep(values: torch.Tensor, _: Routed | None) -> torch.Tensor:
            inputs[edit.layer, edit.block] = values
            return values

        return keep

    def reader_out(edit: ModuleEdit, value: torch.Tensor) -> SiteHook:
        assert edit.right is not None
        key = edit.right[:, 0]

        def add(written: torch.Tensor, _: Routed | None) -> torch.Tensor:
            read = inputs.pop((edit.layer, edit.block))
            coefficient = read @ key.to(read.device, read.dtype)
            return written + coefficient[..., None] * value.to(written.device, written.dtype)

        return add

    readers: dict[tuple[str, int], SiteHook] = {}
    for edit, value in zip(plan.edits, values, strict=True):
        readers[f"{edit.block}_in", edit.layer] = reader_in(edit)
        readers[f"{edit.block}_out", edit.layer] = reader_out(edit, value)
    with site_hooks(loaded.anatomy, readers):
        yield
