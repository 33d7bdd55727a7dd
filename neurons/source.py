"""MODEL, a hub id or a local directory, to a checkpoint directory and to a loaded model: one call for both."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from neurons.anatomy import BLOCKS, Anatomy, anatomy_of, layout_of
from neurons.checkpoint_files import check_architecture, check_directory, check_tied, quantised_sentence
from neurons.errors import BrocaError, UsageError, first_line
from neurons.fingerprint import fingerprint
from neurons.quantisation import way_out
from neurons.self_check import checked, checked_by_likeness
from neurons.stored_anatomy import stored_anatomy
from neurons.tensor_files import read_tensor, tensor_entries

# Second copies of the weights, in layouts that transformers does not read.
OTHER_FORMATS = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
    "consolidated*", "original/*", "onnx/*",
)  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint and where its neurons are, its weights left on disk.

    Attributes:
        name: as the user wrote it.
        checkpoint: the local directory.
        fingerprint: of the checkpoint (``neurons.fingerprint``).
        anatomy: where its neurons are; the modules are empty (meta device) unless it is a LoadedModel.
    """

    name: str
    checkpoint: Path
    fingerprint: str
    anatomy: Anatomy

    @property
    def label(self) -> str:
        """The model as files name it: a hub id, or a directory's own name, the same wherever it lies."""
        return self.checkpoint.resolve().name if Path(self.name).expanduser().is_dir() else self.name

    def require_fingerprint(self, metadata: Mapping[str, Any], path: object) -> None:
        """Refuse a file made from another model.

        Raises:
            BrocaError: the file's fingerprint is not this model's.
        """
        made_for = metadata.get("fingerprint")
        if made_for != self.fingerprint:
            raise BrocaError(
                f"{path}: made for the model {metadata.get('model', '?')} with fingerprint {made_for}, "
                f"but {self.name} has fingerprint {self.fingerprint}: make it again from this model"
            )


@dataclass(frozen=True)
class LoadedModel(ModelSource):
    """A model in memory beside the checkpoint that it came from.

    Attributes:
        model: the transformers causal language model, in eval mode, without gradients on its weights.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def embedded(self) -> int:
        """Rows of the embedding: a tokenizer may know more tokens, or fewer."""
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows


def locate(model: str) -> Path:
    """The local checkpoint directory of a hub id (downloaded where it is not cached) or a local path.

    Raises:
        UsageError: neither a directory with a ``config.json`` nor something the hub has or can be asked, or
            an adapter without its base model.
        BrocaError: more than one model (``neurons.checkpoint_files``).
    """
    path = Path(model).expanduser()
    if path.is_dir():
        check_directory(model, path)
        return path
    if path.exists() or model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise UsageError(f"{model}: there is no such model directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(model, ignore_patterns=list(OTHER_FORMATS)))
    except HFValidationError as error:
        raise UsageError(f"{model}: neither a directory nor a valid hub id") from error
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"{model}: not a local directory, and the hub cannot be reached to look it up there"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"{model}: not a local directory, and the hub says: {first_line(error)}") from error
    check_directory(model, found)
    return found


def pick_device(device: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available here: choose cpu, cuda or auto") from error
    return found


def open_model(model: str) -> ModelSource:
    """Look at a checkpoint without reading its weights.

    Of most known architectures, config.json and the tensors' headers say enough (``neurons.stored_anatomy``);
    transformers, whose classes cost seconds and 150 MB to import, is asked only about the others.

    An architecture that Broca does not know is examined by its structure and must pass the self-check on
    a small random model of the same config class: two layers, a few hundred tokens, narrow where the
    architecture lets itself be.  ``load_model`` repeats the check on the model itself.

    Raises:
        UsageError: no such model.
        BrocaError: quantised, or an unknown architecture that does not pass.
    """
    checkpoint = locate(model)
    anatomy = _from_files(checkpoint)
    if anatomy is None:
        config = _config(model, checkpoint)
        anatomy = anatomy_of(_empty(config))
        if anatomy.layout.examined:
            anatomy = replace(anatomy, layout=checked_by_likeness(config, anatomy.layout))
    check_tied(model, checkpoint)
    return ModelSource(model, checkpoint, fingerprint(checkpoint), anatomy)


def load_model(model: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a causal language model and its tokenizer.

    An architecture that Broca does not know is examined by its structure and must pass the self-check.

    Args:
        model: hub id or local directory.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto" is float32 on a CPU and the checkpoint's own dtype elsewhere; or "float32",
            "bfloat16", "float16".

    Raises:
        UsageError: no such model or device.
        BrocaError: quantised, an unknown architecture that does not pass, or files that cannot be loaded.
    """
    import transformers

    checkpoint = locate(model)
    where = pick_device(device)
    if dtype == "auto":
        wanted: Any = torch.float32 if where.type == "cpu" else "auto"
    elif dtype in ("float32", "bfloat16", "float16"):
        wanted = getattr(torch, dtype)
    else:
        raise UsageError(f"dtype {dtype!r} is unknown: choose auto, float32, bfloat16 or float16")
    config = _config(model, checkpoint)
    if layout_of(config) is None:
        # Refused here, if at all, before any weight is read.
        anatomy_of(_empty(config))
    check_architecture(model, config)
    check_tied(model, checkpoint, bool(getattr(config, "tie_word_embeddings", False)))
    digest = fingerprint(checkpoint)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        with _no_progress_bar():
            loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint,
                dtype=wanted,
                device_map={"": where},
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        _refuse_code(model, error)
        raise BrocaError(f"{model}: cannot be loaded ({first_line(error)})") from error
    # transformers would fill these with random numbers and go on.
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise BrocaError(
            f"{model}: the checkpoint lacks {len(lacking)} of the model's weights or has them in another shape, "
            f"{lacking[0]} first: download it again"
        )
    loaded.eval().requires_grad_(False)
    anatomy = anatomy_of(loaded)
    if anatomy.layout.examined:
        anatomy = checked(loaded, anatomy)
        _compare_with_disk(model, checkpoint, anatomy)
    return LoadedModel(model, checkpoint, digest, anatomy, loaded, tokenizer)


def _compare_with_disk(model: str, checkpoint: Path, anatomy: Anatomy) -> None:
    """Refuse a model whose output weights lie on disk under their names, but turned or permuted.

    Raises:
        BrocaError: by tensor name.
    """
    entries = tensor_entries(checkpoint)
    for layer, block in itertools.product(sorted({0, anatomy.layers - 1}), BLOCKS):
        live = anatomy.output_weight(layer, block)
        for piece in anatomy.stored(layer, block, entries):
            own = anatomy.columns(block, live, piece.columns)
            stored = piece.of(read_tensor(entries[piece.tensor], piece.rows))
            if stored.shape != own.shape or not torch.equal(stored.to(own), own):
                raise BrocaError(
                    f"{model}: tensor {piece.tensor} is not in memory what it is on disk, and how it was "
                    "changed is not known for this architecture, so it could not be edited"
                )


def _from_files(checkpoint: Path) -> Anatomy | None:
    """None also where a file is damaged: what is wrong with it is then said on the way through transformers."""
    try:
        settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        entries = tensor_entries(checkpoint)
    except (OSError, ValueError, RecursionError, BrocaError):
        return None
    return stored_anatomy(settings, entries) if isinstance(settings, dict) else None


def _empty(config: Any) -> Any:
    """The model without its weights, on the meta device.

    Raises:
        BrocaError: transformers has no causal language model for this config.
    """
    import transformers

    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        _refuse_code(config.model_type, error)
        raise BrocaError(
            f"architecture {config.model_type!r} is not known to Broca, nor to transformers as a causal "
            f"language model ({first_line(error)})"
        ) from error
    # Sizes that pass a config class, and are none: what building stumbles over them with may be anything.
    except Exception as error:
        raise BrocaError(
            f"architecture {config.model_type!r}: no model can be built as its config.json says "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _refuse_code(name: str, error: Exception) -> None:
    """Say so where transformers wants to be allowed a checkpoint's own code; what else is wrong, others say."""
    if "trust_remote_code" in str(error):
        raise BrocaError(
            f"{name}: comes with code of its own (auto_map), without which transformers does not know it, and Broca "
            "runs no code from checkpoints: use a release of transformers that has this model, or another checkpoint"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers' bar over the tensors that it loads would stand between a command and its reader."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _config(model: str, checkpoint: Path) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        text = config.get_text_config()
    except (OSError, ValueError, KeyError) as error:
        _refuse_code(model, error)
        raise BrocaError(f"{model}: its config.json cannot be read ({first_line(error)})") from error
    # A config class may refuse a value in any way, and takes lines to say which.
    except Exception as error:
        raise BrocaError(
            f"{model}: its config.json cannot be read ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(text, transformers.PreTrainedConfig):
        raise BrocaError(
            f"{model}: its config.json cannot be read (it has a part for the language model, which "
            f"{config.model_type!r} has not)"
        )
    layout_of(config)
    if getattr(config, "quantization_config", None):
        settings = json.loads((checkpoint / "config.json").read_bytes())
        raise BrocaError(quantised_sentence(model, checkpoint, way_out(settings)))
    return config
