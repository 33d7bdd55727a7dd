"""Reading activations at sites, and replacing them, while a model runs: hooks on modules, and on experts.

Fused experts have no module of their own per expert.  While something reads them, transformers' registry
of experts forwards (``transformers.integrations.moe``) is made to select one that computes what the stock
eager one does and hands over each expert's values on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from neurons.architectures.anatomy import EXPERT_SITES, SITES, Anatomy, first, site_module
from neurons.architectures.examination import examine
from neurons.architectures.layouts import LAYOUTS, Layout
from neurons.errors import BrocaError

_EXPERTS_FORWARD = "broca_reading"


@dataclass(frozen=True)
class Routed:
    """Which tokens an expert's values belong to.

    Attributes:
        expert: index of the expert.
        tokens: int64 [n], indices into the flattened rows * length.
    """

    expert: int
    tokens: torch.Tensor


Reader = Callable[[torch.Tensor, Routed | None], torch.Tensor | None]


def expert_units(anatomy: Anatomy, routed: Routed) -> slice:
    """An expert's neurons among those of its layer."""
    first_unit = routed.expert * anatomy.expert_width
    return slice(first_unit, first_unit + anatomy.expert_width)


@contextmanager
def reading(anatomy: Anatomy, readers: Mapping[tuple[str, int], Reader]) -> Iterator[None]:
    """Hand a site's values to ``readers[site, layer]`` at every forward pass inside the block.

    A reader is called as ``reader(values, None)`` with values [rows, length, width].  For the neurons of
    a mixture (``mlp_act``, ``mlp_up``, ``mlp_in``) it is called as ``reader(values, routed)``, once for
    each expert that has tokens, with values [n, I].  A tensor that it gives back, of the same shape,
    takes the place of the values in the forward pass.

    Values hold until the reader returns: some models write into them afterwards, so what is kept must be
    a copy.  Of a model that is spread over several devices they are handed over on one.  Where gradients are enabled the values lie on the path to the loss and
    ``values.register_hook`` works, also where all weights are frozen.

    Raises:
        BrocaError: a site or layer that there is not, or, at the forward pass, a replacement of another
            shape.
    """
    for site, layer in readers:
        if site not in SITES or not 0 <= layer < anatomy.layers:
            raise BrocaError(
                f"there is no site {site} in layer {layer}: sites are {', '.join(SITES)}, layers "
                f"0-{anatomy.layers - 1}"
            )
    where = anatomy.gathered_on
    if where is not None:
        readers = {place: _gathered(reader, where) for place, reader in readers.items()}
    with ExitStack() as open_now:
        routed: dict[int, dict[str, Reader]] = {}
        shapes: dict[int, _RowShape] = {}
        for (site, layer), reader in readers.items():
            if anatomy.mixed and site in EXPERT_SITES:
                routed.setdefault(layer, {})[site] = reader
                continue
            if layer not in shapes:
                shapes[layer] = _RowShape()
                handle = anatomy.blocks[layer].register_forward_pre_hook(shapes[layer].note, with_kwargs=True)
                open_now.callback(handle.remove)
            module, is_input = site_module(anatomy, site, layer)
            hook = _Hook(reader, shapes[layer], _half(anatomy, site))
            handle = (
                module.register_forward_pre_hook(hook.before)
                if is_input
                else module.register_forward_hook(hook.after)
            )
            open_now.callback(handle.remove)
        if routed:
            experts = {anatomy.gates[layer]: own for layer, own in routed.items()}
            open_now.enter_context(_experts_read(experts))
        yield


def _gathered(reader: Reader, where: torch.device) -> Reader:
    """The reader of a model that lies on several devices: it is called with values, and gives some, on one."""

    def read(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        moved = _moved(values, where)
        if moved is values:
            return reader(values, routed)
        offered = reader(
            moved, None if routed is None else replace(routed, tokens=_moved(routed.tokens, where))
        )
        if offered is None and torch.is_grad_enabled():
            # What the reader saw must lie on the path to the loss.
            offered = moved
        return None if offered is None else _moved(offered, values.device)

    return read


def _moved(values: torch.Tensor, where: torch.device) -> torch.Tensor:
    return values.to(where)


def logits(
    model: Any, hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """The logits [..., vocabulary] of last hidden states [..., d] on their device, as ``model(...).logits``
    has them.

    The output embeddings alone are not enough where the family scales the logits or caps them softly.

    Args:
        head: takes the place of the model's output embeddings.
    """
    text = model.config.get_text_config()
    layout = LAYOUTS.get(model.config.model_type) or _examined_once(model)
    made: torch.Tensor = (model.get_output_embeddings() if head is None else head)(hidden).to(hidden.device)
    scale, divisor, cap = (
        None if name is None else getattr(text, name, None)
        for name in (layout.logit_scale, layout.logit_divisor, layout.softcap)
    )
    if scale is not None:
        made = made * scale
    if divisor is not None:
        made = made / divisor
    if cap is not None:
        made = torch.tanh(made / cap) * cap
    return made


# What logits take of models of unknown architectures: examined once, as logits are made a chunk at a time.
_examined: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def _examined_once(model: nn.Module) -> Layout:
    if model not in _examined:
        _examined[model] = examine(model)
    return _examined[model]


def _half(anatomy: Anatomy, site: str) -> int | None:
    """Which half of a fused module's output a site is; None: all of it."""
    if site not in ("mlp_act", "mlp_up") or anatomy.layout.gate != anatomy.layout.up:
        return None
    return 0 if site == "mlp_act" else 1


class _RowShape:
    """(rows, length) of the hidden states that a layer was given: some flatten them inside."""

    def __init__(self) -> None:
        self.shape: torch.Size | None = None

    def note(self, _: nn.Module, arguments: Any, named: Any) -> None:
        self.shape = (arguments[0] if arguments else named["hidden_states"]).shape[:2]


@dataclass(frozen=True)
class _Hook:
    """One reader at one module."""

    reader: Reader
    rows: _RowShape
    half: int | None

    def before(self, _: nn.Module, inputs: tuple[Any, ...]) -> Any:
        changed = self._changed(inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    def after(self, _: nn.Module, __: Any, output: Any) -> Any:
        changed = self._changed(first(output))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _changed(self, values: torch.Tensor) -> torch.Tensor | None:
        """What takes the values' place; None leaves them, without a copy."""
        if self.half is None:
            return self._offered(values)
        parts = list(values.chunk(2, dim=-1))
        own = self._offered(parts[self.half])
        if own is None and not torch.is_grad_enabled():
            return None
        parts[self.half] = parts[self.half] if own is None else own
        return torch.cat(parts, dim=-1)

    def _offered(self, values: torch.Tensor) -> torch.Tensor | None:
        if values.ndim == 3 or self.rows.shape is None:
            return _offer(self.reader, values, None)
        shape = values.shape
        offered = _offer(self.reader, values.view(*self.rows.shape, shape[-1]), None)
        return None if offered is None else offered.reshape(shape)


def _offer(reader: Reader, values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
    """Call a reader; what must take the values' place, or None.

    With gradients enabled something always does: the reader's tensor, or the values that it was given,
    so that a hook on them sees the gradient.
    """
    tracked = torch.is_grad_enabled()
    leaf = tracked and not values.requires_grad
    if leaf:
        # The weights are frozen, so nothing before this site asks for a gradient.
        values = values.detach().requires_grad_(True)
    replaced = reader(values, routed)
    if replaced is None:
        # A leaf may not be written into, and some models add to what a module returned in place.
        return (values.clone() if leaf else values) if tracked else None
    if replaced.shape != values.shape:
        raise BrocaError(
            f"a reader replaced values of shape {list(values.shape)} by some of shape {list(replaced.shape)}"
        )
    return replaced.to(values.dtype)


# experts module -> the readers of its sites, the contexts that opened first coming first
_readers_of: dict[nn.Module, list[Mapping[str, Reader]]] = {}
# id of a config -> the experts forward that it selected before anything was read
_selected: dict[int, str | None] = {}


@contextmanager
def _experts_read(readers: Mapping[nn.Module, Mapping[str, Reader]]) -> Iterator[None]:
    """Have these experts modules call their readers; the config's own choice comes back afterwards."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if _EXPERTS_FORWARD not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(_EXPERTS_FORWARD, _experts_forward)
    configs: dict[int, Any] = {id(module.config): module.config for module in readers}
    with ExitStack() as undo:
        for key, config in configs.items():
            before = config._experts_implementation_internal
            if before != _EXPERTS_FORWARD:
                _selected[key] = before
                undo.callback(_selected.pop, key)
                # Not through the property, which would choose for the config's parts as well.
                config._experts_implementation_internal = _EXPERTS_FORWARD
                undo.callback(setattr, config, "_experts_implementation_internal", before)
        for module, own in readers.items():
            _readers_of.setdefault(module, []).append(own)
            undo.callback(_close, module, own)
        yield


def _close(module: nn.Module, own: Mapping[str, Reader]) -> None:
    kept = [readers for readers in _readers_of.pop(module) if readers is not own]
    if kept:
        _readers_of[module] = kept


def _experts_forward(
    self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """All experts of a mixture, as the stock eager forward computes them, with the readers called.

    Args:
        self: the experts module: ``gate_up_proj`` [E, 2I, d] and ``down_proj`` [E, d, I], both with their
            last two dimensions swapped if ``is_transposed``; gate and up interleaved unless
            ``is_concatenated``.
        hidden: [tokens, d].
        chosen: int64 [tokens, k], experts of each token.
        weights: [tokens, k], what each expert's output is multiplied with.
    """
    readers = _readers_of.get(self)
    if readers is None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        # A layer that nobody reads goes the way that its config had chosen.
        stock = ALL_EXPERTS_FUNCTIONS.get_interface(
            _selected[id(self.config)], type(self).forward.__wrapped__
        )
        unread: torch.Tensor = stock(self, hidden, chosen, weights)
        return unread
    out = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        # Expert parallelism marks choices of other devices with a number past the last expert.
        if expert >= self.num_experts:
            continue
        tokens, place = torch.where(chosen == expert)
        routed = Routed(expert, tokens)
        gate_up = _experts_linear(self, "gate_up_proj", hidden[tokens], expert)
        gate_up = _read_halves(gate_up, self.is_concatenated, readers, routed)
        inside = _read_experts(readers, "mlp_in", self._apply_gate(gate_up), routed)
        written = _experts_linear(self, "down_proj", inside, expert)
        weighted = written * weights[tokens, place, None]
        out.index_add_(0, tokens, weighted.to(out.dtype))
    return out


def _experts_linear(self: Any, name: str, inputs: torch.Tensor, expert: int) -> torch.Tensor:
    weight = getattr(self, name)[expert]
    made = inputs @ weight if self.is_transposed else nn.functional.linear(inputs, weight)
    return made + getattr(self, f"{name}_bias")[expert] if self.has_bias else made


def _read_halves(
    gate_up: torch.Tensor, concatenated: bool, readers: list[Mapping[str, Reader]], routed: Routed
) -> torch.Tensor:
    if not any(site in own for own in readers for site in ("mlp_act", "mlp_up")):
        return gate_up
    gate, up = gate_up.chunk(2, dim=-1) if concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
    read_gate = _read_experts(readers, "mlp_act", gate, routed)
    read_up = _read_experts(readers, "mlp_up", up, routed)
    if read_gate is gate and read_up is up and not torch.is_grad_enabled():
        return gate_up
    if concatenated:
        return torch.cat([read_gate, read_up], dim=-1)
    return torch.stack([read_gate, read_up], dim=-1).flatten(-2)


def _read_experts(
    readers: list[Mapping[str, Reader]], site: str, values: torch.Tensor, routed: Routed
) -> torch.Tensor:
    for own in readers:
        if site in own:
            offered = _offer(own[site], values, routed)
            values = values if offered is None else offered
    return values
