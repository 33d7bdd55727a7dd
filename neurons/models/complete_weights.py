"""Whether a checkpoint has all of its model's weights; transformers would fill the others at random and go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurons.errors import BrocaError


def require_complete(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers made weights up.

    Args:
        name: of the model, as the user wrote it.
        model: as ``from_pretrained`` gave it, told to ignore mismatched sizes.
        report: what ``output_loading_info`` says: ``missing_keys``, ``unexpected_keys`` and
            ``mismatched_keys``, (tensor, shape in the checkpoint, shape in the model).

    Raises:
        BrocaError: the first tensor by name, and what helps.
    """
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, stored, wanted = mismatched[0]
        raise BrocaError(
            f"{name}: tensor {tensor} is {list(stored)} in the checkpoint and {list(wanted)} by its config.json: "
            "put the config.json there that the weights were saved with"
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
        if own := next((one for one in missing if tensor.endswith(f".{one}")), None):
            raise BrocaError(
                f"{name}: the checkpoint has {tensor} where the model reads {own}: save it again without the "
                f"wrapper that adds {tensor.removesuffix(own)!r} (of an adapter: merged into its model)"
            )
    raise BrocaError(
        f"{name}: the checkpoint lacks {len(missing)} of the weights that its config.json asks for, {missing[0]} "
        "first: download or save it again whole, or put the config.json there that the weights were saved with"
    )


def _head(model: Any) -> str | None:
    """The name of the LM head's weight."""
    head = model.get_output_embeddings()
    weights = dict(model.named_parameters(remove_duplicate=False))
    return next(
        (name for name, weight in weights.items() if head is not None and weight is head.weight), None
    )
