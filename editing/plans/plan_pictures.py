"""Figure of a plan: the change of each component of each layer."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from editing.plans.component_changes import component_changes, component_count
from editing.plans.plan import ModuleEdit, Plan, language_pair
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError
from neurons.neuron_sets.pictures import LINE, TITLE, title_of

WIDE = 10.0  # inches
MAX_COLUMNS = 240  # more would be narrower than a pixel
_NAMES = {"attn": "head", "mlp": "neuron"}


def component_sizes(edit: ModuleEdit, count: int) -> torch.Tensor:
    """The size of the change of each component of a module, float64 [count].

    ||dW_i||_F of component i (``component_changes``), or, for a pure scaling, the largest |c - 1| of its
    columns.

    Args:
        edit: of a module.
        count: number of components of the module.
    """
    if edit.left is not None or edit.dense:
        return component_changes(edit, count)
    if edit.column_scale is not None:
        return (edit.column_scale.double() - 1).abs().view(count, -1).amax(1)
    return torch.zeros(count, dtype=torch.float64)


def plan_figure(plan: Plan) -> Figure:
    """Heat maps layer by component, one for each of "attn" and "mlp" that the plan edits.

    A neuron's change is that of its gate, its linear branch and its output.  Too many neurons are drawn in groups of
    neighbours, with the maximum of each.

    Raises:
        BrocaError: a plan that changes neither heads nor neurons.
    """
    of_block = {
        block: [
            edit
            for edit in plan.edits
            if edit.block == block or (block == "mlp" and edit.block not in BLOCKS and edit.components)
        ]
        for block in BLOCKS
    }
    blocks = [block for block in BLOCKS if of_block[block]]
    if not blocks:
        raise BrocaError("the plan changes neither heads nor neurons: there is nothing to draw")
    layers = 1 + max(edit.layer for edit in plan.edits)
    about = plan.metadata
    ends = language_pair(about)
    pair = "" if ends is None else f", {ends[0]} to {ends[1]}"
    languages = () if pair else about.get("languages", ())
    title = title_of("change of each component" + pair, about, languages, WIDE - 1)
    high = 1.2 + min(8.0, 0.8 + 0.22 * layers)
    figure = Figure(
        figsize=(WIDE, high * len(blocks) + 0.25 + LINE * title.count("\n")), layout="constrained"
    )
    figure.suptitle(title, fontsize=TITLE)
    for axis, block in zip(figure.subplots(len(blocks), squeeze=False)[:, 0], blocks, strict=True):
        count = max(component_count(edit) for edit in of_block[block])
        squares = torch.zeros(layers, count, dtype=torch.float64)
        added = False
        for edit in of_block[block]:
            whole = component_sizes(edit, component_count(edit))
            squares[edit.layer, : len(whole)] += whole.square()
            added = added or edit.left is not None or edit.dense > 0
        sizes = squares.sqrt()
        group = -(-count // MAX_COLUMNS)
        padded = torch.nn.functional.pad(sizes, (0, -count % group)).view(layers, -1, group).amax(-1)
        image = axis.imshow(
            padded.numpy(),
            aspect="auto",
            cmap="magma_r",
            vmin=0,
            interpolation="nearest",
            extent=(-0.5, padded.shape[1] * group - 0.5, layers - 0.5, -0.5),
        )
        what = "||change||" if added else "|factor - 1|"
        figure.colorbar(image, ax=axis, label=what)
        each = "" if group == 1 else f" (maximum of every {group})"
        axis.set(title=f"{_NAMES[block]}s{each}", ylabel="layer", xlabel=_NAMES[block])
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure
