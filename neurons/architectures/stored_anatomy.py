"""The anatomy of a checkpoint from config.json and the tensors' headers, without importing a model class.

Only for dense families whose layout has ``names``, and only if config.json has every needed value and the
tensors agree.  Where a default of transformers would matter, or something does not fit, the result is None,
and transformers interprets the checkpoint or reports the fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from neurons.architectures.anatomy import BLOCKS, HEAD, HEADS_ON_DISK, Anatomy, assembled, layout_of
from neurons.architectures.layouts import LAYOUTS, ConfigNames, Layout
from neurons.architectures.quantisation import is_quantised
from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, TensorEntry

# Names that transformers accepts for the language model's part of a config.
_PARTS = ("text_config", "text_encoder", "decoder", "generator")


def stored_anatomy(settings: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> Anatomy | None:
    """The anatomy of a checkpoint from its config.json and tensor headers alone.

    Args:
        settings: the values of config.json.
        entries: of all tensors, by name (``neurons.files.tensor_files.tensor_entries``).

    Returns:
        The result of ``anatomy_of``, with empty modules (meta device) and only those with a matrix;
        None where the files rely on defaults of transformers, disagree, or are invalid.
    """
    model_type = settings.get("model_type")
    layout = LAYOUTS.get(model_type) if isinstance(model_type, str) else None
    # With configuration_files, transformers may read another file than config.json.
    if layout is None or layout.names is None or "configuration_files" in settings or is_quantised(settings):
        return None
    text = _language_part(settings, layout.names)
    if text is None or not _is_explicit(text, layout):
        return None
    try:
        layout = layout_of(_as_config(str(model_type), text)) or layout
        return _assembled(layout, layout.names or ConfigNames(), str(model_type), text, entries)
    except BrocaError:
        return None


def _language_part(settings: Mapping[str, Any], names: ConfigNames) -> Mapping[str, Any] | None:
    if any(settings.get(part) is not None for part in _PARTS if part != names.part):
        return None
    text = settings if names.part is None else settings.get(names.part)
    return text if isinstance(text, Mapping) else None


def _is_explicit(text: Mapping[str, Any], layout: Layout) -> bool:
    """Whether config.json states every setting that the layout depends on."""
    if layout.activation is not None and not isinstance(text.get(layout.activation), str):
        return False
    switches = [layout.bypassed_by, layout.residual_unless[0] if layout.residual_unless else None]
    return all(isinstance(text.get(name), bool) for name in switches if name is not None)


def _as_config(model_type: str, text: Mapping[str, Any]) -> Any:
    """The settings in the form of a transformers config, for ``layout_of``."""
    part = SimpleNamespace(**{"model_type": model_type, **text})
    return SimpleNamespace(model_type=model_type, get_text_config=lambda: part)


def _assembled(
    layout: Layout,
    names: ConfigNames,
    model_type: str,
    text: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
) -> Anatomy | None:
    layers, heads, d = (_number(text, keys) for keys in (names.layers, names.heads, names.residual))
    stems = [prefix for prefix in layout.prefixes if f"{prefix}0.{layout.stored['attn'][0].name}" in entries]
    # transformers rejects heads that do not divide d, in some families even with a head_dim.
    if layers is None or heads is None or d is None or d % heads or len(stems) != 1:
        return None
    blocks = _skeletons(layout, stems[0], layers, entries)
    # As in ``anatomy_of``; ``assembled`` then checks the columns of o_proj.
    head_dim = d // heads if text.get("head_dim") is None else _number(text, ("head_dim",))
    if blocks is None or head_dim is None:
        return None
    anatomy = assembled(layout, model_type, blocks, residual=d, heads=lambda *_: (heads, head_dim))
    width = _number(text, names.width)
    if width is None and names.expansion is not None and all(text.get(name) is None for name in names.width):
        width = names.expansion * d
    fits = anatomy.neurons == width and _reads_and_writes(anatomy) and _has_its_biases(anatomy, names, text)
    if not fits:
        return None
    beside = stems[0].removesuffix(layout.layers.rpartition(".")[2] + ".")
    outside = {}
    for path, module in _matrices("", entries).items():
        name = path.removeprefix(beside)
        if path.rpartition(".")[2] in HEADS_ON_DISK:
            outside[HEAD] = module
        elif path.startswith(beside) and "." not in name:
            outside[anatomy.parent + name] = module
    return replace(anatomy, outside=outside)


def _matrices(stem: str, entries: Mapping[str, TensorEntry]) -> dict[str, nn.Module]:
    """Path after the stem -> empty module, for each matrix below it."""
    paths = [name.removeprefix(stem).removesuffix(".weight") for name in entries if name.startswith(stem)]
    modules = {
        path: _module(f"{stem}{path}.", entries) for path in paths if f"{stem}{path}.weight" in entries
    }
    return {path: module for path, module in modules.items() if module is not None}


def _number(text: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The size that config.json has under one or more names; None if absent or ambiguous."""
    given = [text[name] for name in names if text.get(name) is not None]
    sized = all(type(value) is int and value > 0 and value == given[0] for value in given)
    return given[0] if given and sized else None


def _skeletons(
    layout: Layout, stem: str, layers: int, entries: Mapping[str, TensorEntry]
) -> tuple[nn.Module, ...] | None:
    """The decoder layers with their matrices; None if one that the layout names is missing."""
    paths = {*layout.outputs.values(), layout.gate, layout.up or layout.gate}
    paths |= {path for switch in layout.bias_switches.values() for path in switch.modules}
    blocks = []
    for layer in range(layers):
        block = nn.Module()
        modules = _matrices(f"{stem}{layer}.", entries)
        if not paths <= modules.keys():
            return None
        for path, module in sorted(modules.items()):
            parent, _, name = path.rpartition(".")
            try:
                _inside(block, parent).add_module(name, module)
            except KeyError:  # no valid name of a module
                return None
        blocks.append(block)
    return tuple(blocks)


def _module(stem: str, entries: Mapping[str, TensorEntry]) -> nn.Module | None:
    """An empty linear module; None if the file has no floating-point matrix for its weight."""
    module = nn.Module()
    for name, dimensions in (("weight", 2), ("bias", 1)):
        entry = entries.get(stem + name)
        if entry is None and name == "bias":
            continue
        if entry is None or len(entry.shape) != dimensions or entry.dtype not in READABLE_DTYPES:
            return None
        empty = torch.empty(entry.shape, dtype=READABLE_DTYPES[entry.dtype], device="meta")
        module.register_parameter(name, nn.Parameter(empty))
    return module


def _inside(block: nn.Module, path: str) -> nn.Module:
    """The module at a path, created if missing."""
    for name in path.split(".") if path else ():
        if name not in dict(block.named_children()):
            block.add_module(name, nn.Module())
        block = block.get_submodule(name)
    return block


def _reads_and_writes(anatomy: Anatomy) -> bool:
    """Whether gates and ups, which ``assembled`` does not check, map d to I (to 2 I if fused)."""
    layout = anatomy.layout
    shape = (anatomy.neurons * (2 if layout.up == layout.gate else 1), anatomy.residual)
    return all(
        part.oriented(module.get_parameter("weight")).shape == shape
        for layer in range(anatomy.layers)
        for part in anatomy.parts(layer, "mlp")
        for module in (part.gate, part.up)
        if module is not None
    )


def _has_its_biases(anatomy: Anatomy, names: ConfigNames, text: Mapping[str, Any]) -> bool:
    """Whether exactly the output modules with a bias in the config have a bias [d] in the file."""
    for block in BLOCKS:
        has_bias = names.biases.get(block, False)
        if isinstance(has_bias, str):
            # A missing bias switch is off; the default of other settings is unknown.
            has_bias = text.get(has_bias, False if block in anatomy.layout.bias_switches else None)
        if not isinstance(has_bias, bool):
            return False
        expected = (anatomy.residual,) if has_bias else None
        for layer in range(anatomy.layers):
            bias = anatomy.output_bias(layer, block)
            if (None if bias is None else tuple(bias.shape)) != expected:
                return False
    return True
