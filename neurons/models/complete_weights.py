"""Check that a checkpoint has all weights of its model; transformers initialises missing ones at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurons.errors import BrocaError


def require_complete(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Reject a model with weights that transformers initialised.

    Args:
        name: of the model, as the user wrote it.
        model: from ``from_pretrained`` with ``ignore_mismatched_sizes``.
        report: from ``output_loading_info``: ``missing_keys``, ``unexpected_keys`` and
            ``mismatched_keys``, (tensor, shape in the checkpoint, shape in the model).

    Raises:
        BrocaError: names the first tensor and the fix.
    """
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, stored, expected = mismatched[0]
        raise BrocaError(
            f"{name}: tensor {tensor} is {list(stored)} in the checkpoint and {list(expected)} by its config.json: "
            "use the config.json that was saved with the weights"
        )
    missing = sorted(map(str, report["missing_keys"]))
    if not missing:
        return
    if missing == [_head(model)]:
        raise BrocaError(
            f"{name}: the checkpoint has no {missing[0]}, and its config.json does not tie the head to the "
            "embeddings: save the model again with its head, or, if its base model ties them, set "
            '"tie_word_embeddings": true in config.json'
        )
    for tensor in sorted(map(str, report["unexpected_keys"])):
        if name_in_model := next((key for key in missing if tensor.endswith(f".{key}")), None):
            raise BrocaError(
                f"{name}: the checkpoint has {tensor} where the model reads {name_in_model}: save it again without the "
                f"wrapper that adds {tensor.removesuffix(name_in_model)!r} (of an adapter: merged into its model)"
            )
    raise BrocaError(
        f"{name}: the checkpoint lacks {len(missing)} of the weights that its config.json requires, first {missing[0]}: "
        "download or save it again completely, or use the config.json that was saved with the weights"
    )


def _head(model: Any) -> str | None:
    """The name of the LM head's weight."""
    head = model.get_output_embeddings()
    weights = dict(model.named_parameters(remove_duplicate=False))
    return next(
        (name for name, weight in weights.items() if head is not None and weight is head.weight), None
    )
