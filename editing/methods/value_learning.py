"""The training of learned and distilled values.

The modules W_m' = W_m + V_m K_m^T of a plan keep their keys K_m [S, r] and get values V_m = r_m Z_m [d, r].  r_m is a
unit for each module, so that the same learning rate suits every model.  Adam (arXiv 1412.6980) optimises Z from the
plan's values, with all edits applied: a module reads what the modules below it write.  After every pass the objective is
measured on held-out batches.  The result is the Z of the best pass, or the plan's values if no pass improves on them.
"""

from __future__ import annotations

import torch

from editing.methods.added_values import adding, values_of, with_value
from editing.plans.plan import ModuleEdit, Plan
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.recording.training import Batch, Minimised, Objective, minimise


def learn_values(
    loaded: LoadedModel,
    plan: Plan,
    objective: Objective[Batch],
    unit: torch.Tensor,
    *,
    passes: int,
    rate: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[ModuleEdit], Minimised]:
    """The plan's edits with learned values, and the training of their Z.

    Args:
        loaded: the unedited model; its weights do not change.
        plan: edits with left and right factors of the same rank and nothing else.
        objective: the loss to minimise.
        unit: float64 [modules], r_m.
        passes: passes over the training data.
        rate: Adam's learning rate for Z: about the change of a coordinate in a step, in units of r_m.
        seed: of the order of the training data.
        progress: called with the number of tokens of each step.

    Raises:
        UsageError: a plan with other edits.
        BrocaError: a loss that is not finite.
    """
    units = unit[:, None, None]
    z = (values_of(plan) / units).float().to(loaded.device).requires_grad_(True)
    made = minimise(
        loaded,
        objective,
        [z],
        lambda values: adding(loaded, plan, values[0]),
        torch.optim.Adam([z], lr=rate),
        passes=passes,
        units=[units.float().to(loaded.device)],
        seed=seed,
        progress=progress,
    )
    values = made.best[0].double() * units
    edits = [with_value(edit, value) for edit, value in zip(plan.edits, values, strict=True)]
    return edits, made
