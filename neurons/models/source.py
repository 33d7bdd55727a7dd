"""Open or load a model from a hub id or a local directory."""

from __future__ import annotations

import itertools
import json
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError

from neurons.architectures.anatomy import BLOCKS, Anatomy, anatomy_of, layout_of, with_modules_of
from neurons.architectures.auto_class import auto_class
from neurons.architectures.low_bits import (
    keep_layout,
    quantisation_config,
    quantised_bytes,
    quantised_settings,
)
from neurons.architectures.offload import execution_device, offloaded_bytes, reload_for_gradients
from neurons.architectures.quantisation import quantised_remedy
from neurons.architectures.self_check import checked, checked_layers, checked_on_small_model
from neurons.architectures.stored_anatomy import stored_anatomy
from neurons.errors import BrocaError, UsageError, first_line
from neurons.files.digest import digest_of, digests_of
from neurons.files.tensor_files import read_tensor, tensor_entries
from neurons.models.checkpoint_files import (
    check_architecture,
    check_directory,
    check_tied,
    quantised_message,
)
from neurons.models.complete_weights import require_complete
from neurons.models.fingerprint import fingerprint
from neurons.models.memory import count_model, memory_beside_work, memory_for_weights, sizes_of
from neurons.models.placement import max_memory_per_device, weight_bytes
from neurons.models.processes import own_gpu
from neurons.models.tokenizer import load_tokenizer
from neurons.setting import DTYPES

# Copies of the weights in other formats.
OTHER_FORMATS = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
    "consolidated*", "original/*", "onnx/*",
)  # fmt: skip

BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint and its anatomy, with the weights on disk.

    Attributes:
        name: as the user wrote it.
        fingerprint: of the checkpoint (``neurons.models.fingerprint``).
        anatomy: of the model; its modules are empty (meta device) unless this is a LoadedModel.
    """

    name: str
    checkpoint: Path
    fingerprint: str
    anatomy: Anatomy

    @property
    def label(self) -> str:
        """The name of the model in files: a hub id, or the name of the directory without its path."""
        return self.checkpoint.resolve().name if Path(self.name).expanduser().is_dir() else self.name

    @property
    def files_digest(self) -> str:
        """sha256 of the files beside the weights: the fingerprint does not cover tokenizer, template and generation config."""
        return digest_of(digests_of(self.checkpoint, BESIDE_WEIGHTS))

    def require_fingerprint(self, metadata: Mapping[str, Any], path: object) -> None:
        """Reject a file made with another model.

        Raises:
            BrocaError: the file's fingerprint is not this model's.
        """
        made_for = metadata.get("fingerprint")
        if made_for != self.fingerprint:
            raise BrocaError(
                f"{path}: made for the model {metadata.get('model', '?')} with fingerprint {made_for}, "
                f"but {self.name} has fingerprint {self.fingerprint}: make it again with this model"
            )


@dataclass(frozen=True)
class LoadedModel(ModelSource):
    """A model in memory, with its checkpoint.

    Attributes:
        model: the transformers causal language model, in eval mode, without gradients on its weights.
        quantised: bits, type and bitsandbytes' version if the weights were quantised on loading; else None.
            The fingerprint is that of the checkpoint in both cases, since edits apply to it.
    """

    model: Any
    tokenizer: Any
    quantised: Mapping[str, Any] | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        """Metadata for files, if the weights were quantised."""
        return {} if self.quantised is None else {"quantised": dict(self.quantised)}

    @property
    def offload_note(self) -> str | None:
        """A sentence about offloaded weights; None without any."""
        offloaded = offloaded_bytes(self.model)
        if not offloaded:
            return None
        total = sum(parameter.nbytes for parameter in self.model.parameters())
        return (
            f"{offloaded / total:.0%} of the {total / 1e9:.3g} GB of {self.name}'s weights do not fit on {self.device} and "
            "are read from main memory or disk when needed, which is slower"
        )

    def require_exact(self, what: str) -> None:
        """Reject weights that are not exactly the checkpoint's.

        Raises:
            BrocaError: they were quantised on loading.
        """
        if self.quantised is not None:
            raise BrocaError(
                f"{self.name} is loaded in {self.quantised['bits']} bits, and {what} needs its exact weights: "
                "load it unquantised"
            )

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, to which batches are moved."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding, which may differ from the number of tokens of the tokenizer."""
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows


def locate(model: str) -> Path:
    """The local checkpoint directory of a hub id (downloaded if not cached) or a local path.

    Raises:
        UsageError: neither a directory with a ``config.json`` nor a reachable model on the hub, or an adapter
            without its base model.
        BrocaError: more than one model (``neurons.models.checkpoint_files``).
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
        downloaded = Path(snapshot_download(model, ignore_patterns=list(OTHER_FORMATS)))
    except HFValidationError as error:
        raise UsageError(f"{model}: neither a directory nor a valid hub id") from error
    except LocalEntryNotFoundError as error:
        raise UsageError(f"{model}: not a local directory, and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"{model}: not a local directory, and the hub says: {first_line(error)}") from error
    check_directory(model, downloaded)
    return downloaded


def pick_device(device: str = "auto") -> torch.device:
    """The device; "auto" is CUDA if available, else the CPU.  Each process on a machine gets its own GPU.

    Raises:
        UsageError: no such device, or fewer GPUs than processes.
    """
    if device == "auto":
        return own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    if device == "cuda" and torch.cuda.is_available():
        return own_gpu()
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        known = "cpu, cuda or auto" if torch.cuda.is_available() else "cpu or auto"
        raise UsageError(f"device {device!r} is not available here: choose {known}") from error
    return chosen


def open_model(model: str | Path, quantised: bool = False) -> ModelSource:
    """Open a checkpoint without reading its weights.

    For most architectures in the table, config.json and the tensors' headers are enough
    (``neurons.architectures.stored_anatomy``); transformers, which takes seconds and 150 MB to import, is used
    only for the others.

    An architecture that is not in the table is examined by its structure and must pass the self-check on a small
    random model of the same config class: two layers, a few hundred tokens, narrow if possible.  ``load_model``
    repeats the check on the model itself.

    Args:
        model: hub id or local directory.
        quantised: accept a quantised checkpoint, whose stored numbers are not its weights.

    Raises:
        UsageError: no such model.
        BrocaError: quantised, or an architecture that fails the self-check.
    """
    model = str(model)
    checkpoint = locate(model)
    anatomy = _from_files(checkpoint)
    if anatomy is None:
        config = read_config(model, checkpoint, quantised)
        anatomy = anatomy_of(_empty(config))
        if anatomy.layout.examined:
            anatomy = replace(anatomy, layout=checked_on_small_model(config, anatomy.layout))
    check_tied(model, checkpoint)
    return ModelSource(model, checkpoint, fingerprint(checkpoint), anatomy)


def load_model(
    model: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: int | None = None,
    bits: int | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    With "auto", weights that do not fit on one device are on several: GPUs, then main memory, then disk, from
    where they are read whenever their module runs.  Results are the same, and backward passes keep to the
    memory limit too.

    An architecture that is not in the table is examined by its structure and must pass the self-check.

    Args:
        model: hub id or local directory.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto" is float32 on a CPU and the checkpoint's own dtype elsewhere; or "float32",
            "bfloat16", "float16".
        max_memory: maximum bytes of weights on each GPU and in main memory; 0 leaves all on disk.  Default:
            what ``neurons.models.memory.limit_memory`` leaves, else 90 % of the free memory.
        bits: 4 or 8 quantises the weights of linear modules with bitsandbytes, to record activations and
            directions; they cannot be edited, and must fit on one device.

    Raises:
        UsageError: no such model or device, bitsandbytes missing, or weights that do not fit.
        BrocaError: quantised, an architecture that fails the self-check, or files that cannot be loaded.
    """
    model = str(model)
    quantised = None if bits is None else quantised_settings(bits)
    checkpoint = locate(model)
    where = pick_device(device)
    if dtype == "auto":
        target: Any = torch.float32 if where.type == "cpu" else "auto"
    elif dtype in DTYPES:
        target = getattr(torch, dtype)
    else:
        raise UsageError(f"dtype {dtype!r} is unknown: choose from {', '.join(DTYPES)}")
    config = read_config(model, checkpoint)
    if layout_of(config) is None:
        # Raises before any weight is read.
        anatomy_of(_empty(config))
    check_architecture(model, config)
    check_tied(model, checkpoint, bool(getattr(config, "tie_word_embeddings", False)))
    digest = fingerprint(checkpoint)
    each = None if target == "auto" else target.itemsize
    allowed = memory_for_weights() if max_memory is None else max_memory
    computed = config.dtype if target == "auto" else target
    size = (
        weight_bytes(checkpoint, each)
        if bits is None
        else quantised_bytes(_empty(config), bits, (computed or torch.float32).itemsize)
    )
    per_device = max_memory_per_device(size, where, allowed)
    place: dict[str, Any] = {"device_map": {"": where}}
    folder: TemporaryDirectory[str] | None = None
    if bits is not None:
        place["quantization_config"] = quantisation_config(bits, computed)
        if per_device is not None:
            raise UsageError(
                f"{model}: in {bits} bits its weights do not fit on {where}, and quantised weights cannot be "
                "offloaded: load it unquantised with --device auto, which offloads what does not fit"
            )
    elif device == "auto" and per_device is not None:
        # For offloaded weights whose form on disk differs from the model's: fused experts.
        folder = TemporaryDirectory(prefix="broca-")
        if max_memory is None and "cpu" in per_device:
            # Weights in memory save little if the others are read anyway: they leave room for full batches.
            planned = ModelSource(model, checkpoint, digest, anatomy_of(_empty(config)))
            per_device["cpu"] = min(per_device["cpu"], memory_beside_work(sizes_of(planned, each)))
        place = {"device_map": "auto", "max_memory": per_device, "offload_folder": folder.name}
    elif per_device is not None and allowed is not None:
        raise UsageError(
            f"{model}: its weights need more than the {allowed / 1e9:.1f} GB allowed on {where}: use "
            "--device auto, which offloads the rest to main memory or disk"
        )
    try:
        tokenizer = load_tokenizer(checkpoint)
        with quietly():
            loaded, report = auto_class(config).from_pretrained(
                checkpoint,
                dtype=target,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, with both sizes
                **place,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        _reject_remote_code(model, error)
        raise BrocaError(f"{model}: cannot be loaded ({first_line(error)})") from error
    require_complete(model, loaded, report)
    loaded.eval().requires_grad_(False)
    if folder is not None:
        weakref.finalize(loaded, folder.cleanup)
    reload_for_gradients(loaded)
    if bits is not None:
        keep_layout(loaded)
    anatomy = anatomy_of(loaded) if bits is None else with_modules_of(anatomy_of(_empty(config)), loaded)
    if anatomy.layout.examined:
        # The check zeroes weights and compares layers, of plain modules on one device: for others it uses a small model.
        anatomy = (
            replace(anatomy, layout=checked_on_small_model(config, anatomy.layout))
            if "max_memory" in place or bits is not None
            else checked(loaded, anatomy)
        )
        if bits is None:
            _compare_with_disk(model, checkpoint, anatomy)
    if "max_memory" in place:
        anatomy = replace(anatomy, gathered_on=execution_device(loaded.get_input_embeddings()))
    made = LoadedModel(model, checkpoint, digest, anatomy, loaded, tokenizer, quantised)
    count_model(made)
    return made


def plan_model(model: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """A model without weights, on the meta device, for dry runs.

    A local directory needs only ``config.json``; without a tokenizer ``tokenizer`` is None.

    Args:
        model: hub id or local directory.
        device: as for ``load_model``.
        dtype: as for ``load_model``.

    Raises:
        UsageError: no such model or device.
        BrocaError: quantised, or an architecture that is not supported.
    """
    checkpoint = locate(model)
    config = read_config(model, checkpoint)
    where = pick_device(device)
    stored = getattr(config, "dtype", None) or torch.float32
    of_model = (
        (torch.float32 if where.type == "cpu" else stored) if dtype == "auto" else getattr(torch, dtype)
    )
    empty = _empty(config).to(of_model).eval().requires_grad_(False)
    try:
        tokenizer = load_tokenizer(checkpoint)
    except (OSError, ValueError, KeyError, RuntimeError):
        tokenizer = None
    return LoadedModel(model, checkpoint, "", anatomy_of(empty), empty, tokenizer)


def _compare_with_disk(model: str, checkpoint: Path, anatomy: Anatomy) -> None:
    """Reject a model whose output weights have another order or orientation on disk.

    Raises:
        BrocaError: names the tensor.
    """
    entries = tensor_entries(checkpoint)
    for layer, block in itertools.product(checked_layers(anatomy), BLOCKS):
        if not anatomy.has(layer, block):
            continue
        for piece in anatomy.stored(layer, block, entries):
            part = anatomy.part_of(layer, block, piece.columns.start)
            in_memory = part.cut(part.values, piece.columns)
            stored = piece.of(read_tensor(entries[piece.tensor], piece.rows))
            if stored.shape != in_memory.shape or not torch.equal(stored.to(in_memory), in_memory):
                raise BrocaError(
                    f"{model}: tensor {piece.tensor} differs between memory and disk, and the conversion of this "
                    "architecture is unknown, so it cannot be edited"
                )


def _from_files(checkpoint: Path) -> Anatomy | None:
    """The anatomy from files; None also if a file is damaged, which transformers then reports."""
    try:
        settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        entries = tensor_entries(checkpoint)
    except (OSError, ValueError, RecursionError, BrocaError):
        return None
    return stored_anatomy(settings, entries) if isinstance(settings, dict) else None


def _empty(config: Any) -> Any:
    """The model without weights, on the meta device.

    Raises:
        BrocaError: transformers has no causal language model for this config, or it needs a library that is missing.
    """
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=False)
    except ValueError as error:
        _reject_remote_code(config.model_type, error)
        raise BrocaError(
            f"architecture {config.model_type!r} is supported neither by Broca nor by transformers as a causal "
            f"language model ({first_line(error)})"
        ) from error
    except ImportError as error:
        raise BrocaError(
            f"architecture {config.model_type!r} needs a library that is not installed: "
            f"{first_line(error).partition('. ')[0]}"
        ) from error
    # Invalid sizes that pass the config class may raise anything here.
    except Exception as error:
        raise BrocaError(
            f"architecture {config.model_type!r}: no model can be built from its config.json "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _reject_remote_code(name: str, error: Exception) -> None:
    """Raise if transformers asks for ``trust_remote_code``."""
    if "trust_remote_code" in str(error):
        raise BrocaError(
            f"{name}: needs its own code (auto_map), and Broca "
            "runs no code from checkpoints: use a release of transformers that has this model, or another checkpoint"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Context without transformers' progress bar and accelerate's message about offloading."""
    from transformers.utils import logging as bars

    shown, dispatch = bars.is_progress_bar_enabled(), logging.getLogger("accelerate.big_modeling")
    bars.disable_progress_bar()
    before = dispatch.level
    dispatch.setLevel(logging.ERROR)
    try:
        yield
    finally:
        dispatch.setLevel(before)
        if shown:
            bars.enable_progress_bar()


def read_config(model: str, checkpoint: Path, quantised: bool = False) -> Any:
    """The config of a checkpoint that Broca supports.

    Args:
        model: its name, for messages.
        quantised: whether quantised weights are accepted.

    Raises:
        BrocaError: a config that cannot be read, or of weights that are quantised.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        text = config.get_text_config()
    except (OSError, ValueError, KeyError) as error:
        _reject_remote_code(model, error)
        raise BrocaError(f"{model}: its config.json cannot be read ({first_line(error)})") from error
    # A config class may raise anything, with messages of several lines.
    except Exception as error:
        raise BrocaError(
            f"{model}: its config.json cannot be read ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(text, transformers.PreTrainedConfig):
        raise BrocaError(
            f"{model}: its config.json cannot be read (it has a part for the language model, but "
            f"{config.model_type!r} has none)"
        )
    layout_of(config)
    if quantised:
        # The modules of the unquantised model.
        for part in (config, text):
            vars(part).pop("quantization_config", None)
    elif any(getattr(part, "quantization_config", None) for part in (config, text)):
        settings = json.loads((checkpoint / "config.json").read_bytes())
        raise BrocaError(quantised_message(model, checkpoint, quantised_remedy(settings)))
    return config
