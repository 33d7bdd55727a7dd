"""Checks for contents of a checkpoint directory with which transformers, vLLM and Broca load different models.

They look at names and headers, and at the values of two tensors that should be tied.  docs/checkpoints.md has a
table of what each engine loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from neurons.architectures.quantisation import is_quantised
from neurons.errors import BrocaError, UsageError
from neurons.files.tensor_files import INDEX_ENDING, READABLE_DTYPES, TensorEntry, read_tensor, tensor_entries

_ADAPTER = "adapter_config.json"
_QUANTISED_FOR_VLLM = ("compression_config", "hf_quant_config.json")
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_ROWS_AT_ONCE = 4096


def check_directory(model: str, checkpoint: Path) -> None:
    """Reject a directory without a model, or with more than one.

    Args:
        model: as the user wrote it.

    Raises:
        UsageError: no ``config.json``, or an adapter without its base model.
        BrocaError: an adapter beside a model; a setting or file that makes one engine read other weights, or read
            them differently; a damaged ``generation_config.json``.
    """
    adapter = (checkpoint / _ADAPTER).is_file()
    if not (checkpoint / "config.json").is_file() or (adapter and not _has_weights(checkpoint)):
        if adapter:
            base = _settings(checkpoint / _ADAPTER).get("base_model_name_or_path")
            of = f" of {base}" if isinstance(base, str) and base else ""
            raise UsageError(
                f"{model}: an adapter{of}, not a model: load it on its base model with peft, call "
                "merge_and_unload() and save_pretrained(), and use the result"
            )
        raise UsageError(f"{model}: a directory without config.json, so not a model checkpoint")
    if adapter:
        raise BrocaError(
            f"{model}: has an adapter ({_ADAPTER}) beside a whole model; transformers adds it if peft is installed, "
            "vLLM does not: move the adapter to a directory of its own, or merge it and remove it"
        )
    settings = _settings(checkpoint / "config.json")
    other = settings.get("transformers_weights")
    if other is not None:
        raise BrocaError(
            f"{model}: its config.json has transformers_weights {other!r}, from which transformers reads the weights "
            "and vLLM does not: remove the setting and all weights but those to use"
        )
    # A checkpoint that is quantised for both engines has a quantization_config in config.json.
    if not is_quantised(settings):
        for what in _QUANTISED_FOR_VLLM:
            if what in settings or (checkpoint / what).is_file():
                raise BrocaError(
                    f"{model}: with its {what} vLLM treats the weights as quantised, transformers does not: remove it, "
                    "or start from the unquantised checkpoint"
                )
    _check_names(model, checkpoint)
    _check_ends(model, checkpoint)


def _check_names(model: str, checkpoint: Path) -> None:
    found = {
        ending: {path.name for path in checkpoint.glob(f"*{ending}")}
        for ending in (".safetensors", INDEX_ENDING)
    }
    names = found[INDEX_ENDING] or found[".safetensors"]
    if len(names) == 1 and not {"model.safetensors", f"model{INDEX_ENDING}"} & set().union(*found.values()):
        (name,) = names
        raise BrocaError(
            f"{model}: its weights are in {name}, but transformers reads only model.safetensors and "
            f"model{INDEX_ENDING}: rename it, or download the checkpoint completely"
        )


def _check_ends(model: str, checkpoint: Path) -> None:
    path = checkpoint / "generation_config.json"
    if not path.is_file():
        return
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, RecursionError, AttributeError):
        ends = path.name
    if not all(end is None or type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise BrocaError(
            f"{model}: its {path.name} is not a JSON object with one or more numbers as eos_token_id, so engines end "
            "answers differently: correct or remove it"
        )


def check_tied(model: str, checkpoint: Path, tied: bool | None = None) -> None:
    """Reject a stored output head that differs from the embedding to which the config ties it.

    Args:
        model: as the user wrote it.
        tied: ``tie_word_embeddings``; None reads it from config.json, or takes the default of its model type.

    Raises:
        BrocaError: names both tensors; or as ``tensor_entries``.
    """
    copies = tied_copies(checkpoint, tied)
    entries = tensor_entries(checkpoint) if copies else {}
    if copies and not _equal(*(entries[name] for name in copies)):
        raise BrocaError(
            f"{model}: tie_word_embeddings ties {copies[0]} to {copies[1]}, but the two differ: "
            "transformers uses both, vLLM only the embedding: set tie_word_embeddings to false, "
            f"or remove {copies[0]} from the weights"
        )


def tied_copies(checkpoint: Path, tied: bool | None = None) -> tuple[str, ...]:
    """The names of the output head and the embedding to which the config ties it, if both are stored; else ().

    Args:
        tied: as for ``check_tied``.
    """
    settings = _settings(checkpoint / "config.json")
    if tied is None and "tie_word_embeddings" in settings:
        tied = bool(settings["tie_word_embeddings"])
    if tied is False:
        return ()
    found = [
        [name for name in tensor_entries(checkpoint) if name.endswith(ends)] for ends in (_HEADS, _EMBEDDINGS)
    ]
    if [len(names) for names in found] != [1, 1] or not (tied or _ties_by_default(settings)):
        return ()
    return found[0][0], found[1][0]


def _ties_by_default(settings: Mapping[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    model_type = settings.get("model_type")
    return model_type in CONFIG_MAPPING and bool(
        getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", False)
    )


def check_architecture(model: str, config: Any) -> None:
    """Reject ``architectures`` of another model type: vLLM uses them, transformers uses ``model_type``.

    Args:
        model: as the user wrote it.
        config: a transformers config of a known model type.

    Raises:
        BrocaError: names both.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    types = {config.model_type, config.get_text_config().model_type}
    # Some types have no class of their own: transformers writes that of another for them.
    registries = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    own = [registry.get(config.model_type) for registry in registries]
    for name in config.architectures or ():
        config_class = getattr(getattr(transformers, name, None), "config_class", None)
        if config_class is not None and config_class.model_type not in types and name not in own:
            raise BrocaError(
                f"{model}: its config.json has model_type {config.model_type!r}, which transformers uses, and "
                f"architectures {name!r} of {config_class.model_type!r}, which vLLM uses: correct the wrong one"
            )


def quantised_message(model: str, checkpoint: Path, remedy: str) -> str:
    """The error message for a checkpoint with a ``quantization_config``.

    Args:
        model: as the user wrote it.
        remedy: how to get an editable checkpoint if the weights are quantised.
    """
    try:
        entries: Iterable[TensorEntry] = tensor_entries(checkpoint).values()
        plain = all(entry.dtype in READABLE_DTYPES for entry in entries if len(entry.shape) > 1)
    except BrocaError:
        plain = False
    if plain:
        return (
            f"{model}: its config.json has a quantization_config, but its weights are stored unquantised: engines "
            "would quantise them on loading: remove quantization_config from config.json"
        )
    return f"{model}: a quantised checkpoint, whose weights cannot be edited: {remedy}"


def _has_weights(checkpoint: Path) -> bool:
    weights = [path for path in checkpoint.glob("*.safetensors") if not path.name.startswith("adapter_")]
    return bool(weights) or any(checkpoint.glob(f"*{INDEX_ENDING}")) or any(checkpoint.glob("pytorch_model*"))


def _equal(first: TensorEntry, second: TensorEntry) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype) or first.dtype not in READABLE_DTYPES:
        return False
    return all(
        torch.equal(read_tensor(first, rows), read_tensor(second, rows))
        for rows in (slice(i, i + _ROWS_AT_ONCE) for i in range(0, first.shape[0], _ROWS_AT_ONCE))
    )


def _settings(path: Path) -> Mapping[str, Any]:
    """The values of a JSON file; {} if it is damaged, which its main reader reports."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
