"""MODEL, a hub id or a local directory, to a checkpoint directory and to a loaded model: one call for both."""

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
from neurons.architectures.low_bits import keep_layout, quantisation_config, quantised_settings
from neurons.architectures.offload import execution_device, offloaded_bytes, reload_for_gradients
from neurons.architectures.quantisation import quantised_remedy
from neurons.architectures.self_check import checked, checked_on_small_model
from neurons.architectures.stored_anatomy import stored_anatomy
from neurons.errors import BrocaError, UsageError, first_line
from neurons.files.tensor_files import read_tensor, tensor_entries
from neurons.models.checkpoint_files import (
    check_architecture,
    check_directory,
    check_tied,
    quantised_sentence,
)
from neurons.models.complete_weights import require_complete
from neurons.models.fingerprint import fingerprint
from neurons.models.memory import memory_for_weights
from neurons.models.placement import memory_to_spread_over
from neurons.models.processes import own_gpu

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
        fingerprint: of the checkpoint (``neurons.models.fingerprint``).
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
        quantised: where its weights were quantised on loading: bits, type and bitsandbytes' version, for files
            to tell; else None.  The fingerprint is the checkpoint's all the same, for that is what gets edited.
    """

    model: Any
    tokenizer: Any
    quantised: Mapping[str, Any] | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What the metadata of files holds where weights were quantised."""
        return {} if self.quantised is None else {"quantised": dict(self.quantised)}

    @property
    def waiting(self) -> str | None:
        """Where weights wait until their module runs, as a sentence; None where all are in place."""
        apart = offloaded_bytes(self.model)
        if not apart:
            return None
        total = sum(parameter.nbytes for parameter in self.model.parameters())
        return (
            f"{apart / total:.0%} of the {total / 1e9:.3g} GB of {self.name}'s weights do not fit on {self.device} and "
            "are read from main memory or disk whenever they are needed, which takes longer"
        )

    def require_exact(self, what: str) -> None:
        """Refuse weights that are not the checkpoint's.

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
        """Where a batch is put: that of the embeddings, wherever the layers compute."""
        return execution_device(self.model.get_input_embeddings())

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
    """ "auto" is CUDA where there is one, else the CPU; of several processes on a machine, each gets its own GPU.

    Raises:
        UsageError: no such device here, or fewer GPUs than processes.
    """
    if device == "auto":
        return own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    if device == "cuda" and torch.cuda.is_available():
        return own_gpu()
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available here: choose cpu, cuda or auto") from error
    return found


def open_model(model: str | Path) -> ModelSource:
    """Look at a checkpoint without reading its weights.

    Of most known architectures, config.json and the tensors' headers say enough (``neurons.architectures.stored_anatomy``);
    transformers, whose classes cost seconds and 150 MB to import, is asked only about the others.

    An architecture that Broca does not know is examined by its structure and must pass the self-check on
    a small random model of the same config class: two layers, a few hundred tokens, narrow where the
    architecture lets itself be.  ``load_model`` repeats the check on the model itself.

    Raises:
        UsageError: no such model.
        BrocaError: quantised, or an unknown architecture that does not pass.
    """
    model = str(model)
    checkpoint = locate(model)
    anatomy = _from_files(checkpoint)
    if anatomy is None:
        config = _config(model, checkpoint)
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

    With "auto", weights that do not fit on one device lie on several: GPUs, then main memory, then the disk,
    from where they are read whenever their module runs.  Figures are the same, and the memory is kept to in
    backward passes too.

    An architecture that Broca does not know is examined by its structure and must pass the self-check.

    Args:
        model: hub id or local directory.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto" is float32 on a CPU and the checkpoint's own dtype elsewhere; or "float32",
            "bfloat16", "float16".
        max_memory: most bytes of weights on each GPU and in main memory; 0 leaves all on disk.  Default: what
            ``neurons.models.memory.limit_memory`` leaves, else 90 % of what is free.
        bits: 4 or 8 quantises the linear modules' weights by bitsandbytes, to read activations and directions
            off them; they cannot be edited, and must fit on one device.

    Raises:
        UsageError: no such model or device, bitsandbytes missing, or weights that do not fit where they must.
        BrocaError: quantised, an unknown architecture that does not pass, or files that cannot be loaded.
    """
    model = str(model)
    import transformers

    quantised = None if bits is None else quantised_settings(bits)
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
    each = None if wanted == "auto" else wanted.itemsize
    if max_memory is None:
        max_memory = memory_for_weights()
    spread = memory_to_spread_over(checkpoint, where, each if bits is None else bits / 8, max_memory)
    place: dict[str, Any] = {"device_map": {"": where}}
    folder: TemporaryDirectory[str] | None = None
    if bits is not None:
        place["quantization_config"] = quantisation_config(bits, config.dtype if wanted == "auto" else wanted)
        if spread is not None:
            raise UsageError(
                f"{model}: in {bits} bits its weights do not fit on {where}, and quantised weights cannot wait "
                "elsewhere: leave the quantisation out, then --device auto leaves on disk what does not fit"
            )
    elif device == "auto" and spread is not None:
        # For what is to wait on disk, and is not there as the model needs it: experts that it has fused.
        folder = TemporaryDirectory(prefix="broca-")
        place = {"device_map": "auto", "max_memory": spread, "offload_folder": folder.name}
    elif spread is not None and max_memory is not None:
        raise UsageError(
            f"{model}: its weights take more than the {max_memory / 1e9:.1f} GB allowed on {where}: choose "
            "--device auto, which leaves the rest in main memory or on disk"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        with _quietly():
            loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint,
                dtype=wanted,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # refused below, with both sizes
                **place,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        _refuse_code(model, error)
        raise BrocaError(f"{model}: cannot be loaded ({first_line(error)})") from error
    require_complete(model, loaded, report)
    loaded.eval().requires_grad_(False)
    if folder is not None:
        weakref.finalize(loaded, folder.cleanup)
    offloaded = offloaded_bytes(loaded) > 0
    if offloaded:
        reload_for_gradients(loaded)
    if bits is not None:
        keep_layout(loaded)
    anatomy = anatomy_of(loaded) if bits is None else with_modules_of(anatomy_of(_empty(config)), loaded)
    if anatomy.layout.examined:
        # The check silences weights, which other modules than plain ones in memory do not hold: of those it is
        # done on a small likeness.
        anatomy = (
            replace(anatomy, layout=checked_on_small_model(config, anatomy.layout))
            if offloaded or bits is not None
            else checked(loaded, anatomy)
        )
        if bits is None:
            _compare_with_disk(model, checkpoint, anatomy)
    if "max_memory" in place:
        anatomy = replace(anatomy, gathered_on=execution_device(loaded.get_input_embeddings()))
    return LoadedModel(model, checkpoint, digest, anatomy, loaded, tokenizer, quantised)


def plan_model(model: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """A model without its weights, on the meta device, to plan with: its sizes, its tokenizer.

    A local directory needs no more than ``config.json``; without a tokenizer its ``tokenizer`` is None.

    Args:
        model: hub id or local directory.
        device: as ``load_model`` is to be given.
        dtype: as ``load_model`` is to be given.

    Raises:
        UsageError: no such model or device.
        BrocaError: quantised, or an architecture that Broca does not know.
    """
    import transformers

    checkpoint = locate(model)
    config = _config(model, checkpoint)
    where = pick_device(device)
    stored = getattr(config, "dtype", None) or torch.float32
    own = (torch.float32 if where.type == "cpu" else stored) if dtype == "auto" else getattr(torch, dtype)
    empty = _empty(config).to(own).eval().requires_grad_(False)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError):
        tokenizer = None
    return LoadedModel(model, checkpoint, "", anatomy_of(empty), empty, tokenizer)


def _compare_with_disk(model: str, checkpoint: Path, anatomy: Anatomy) -> None:
    """Refuse a model whose output weights lie on disk under their names, but turned or permuted.

    Raises:
        BrocaError: by tensor name.
    """
    entries = tensor_entries(checkpoint)
    for layer, block in itertools.product(sorted({0, anatomy.layers - 1}), BLOCKS):
        live = anatomy.weight_values(layer, block)
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
def _quietly() -> Iterator[None]:
    """transformers' bar over the tensors that it loads, and accelerate's word on those that it leaves on disk,
    would stand between a command and its reader."""
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
        raise BrocaError(quantised_sentence(model, checkpoint, quantised_remedy(settings)))
    return config
