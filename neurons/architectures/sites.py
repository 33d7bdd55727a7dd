"""Hooks that read or replace activations at sites while a model runs, on modules and on experts.

Fused experts have no module for each expert.  While hooks are on them, transformers' registry of experts
forwards (``transformers.integrations.moe``) selects one that computes the same as the stock eager one and
passes each expert's values to the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from neurons.architectures.anatomy import (
    COMMON,
    EXPERT_SITES,
    ROUTER_IN,
    ROUTER_SITES,
    SITES,
    Anatomy,
    Part,
    first,
    output_module,
)
from neurons.architectures.examination import examine
from neurons.architectures.layouts import Layout, row_of
from neurons.architectures.offload import parameter_value
from neurons.errors import BrocaError

_EXPERTS_FORWARD = "broca_reading"


@dataclass(frozen=True)
class Routed:
    """The tokens of an expert's values.

    Attributes:
        tokens: int64 [n], indices into the flattened rows * length.
        weights: [n], the factors of the expert's outputs: the router's weights, of a shared expert the sigmoids that
            multiply it; None without a factor, and for experts that get weighted inputs.
    """

    expert: int
    tokens: torch.Tensor
    weights: torch.Tensor | None = None


SiteHook = Callable[[torch.Tensor, Routed | None], torch.Tensor | None]


def expert_units(anatomy: Anatomy, routed: Routed) -> slice:
    """The slice of an expert's neurons in its layer."""
    first_unit = routed.expert * anatomy.expert_width
    return slice(first_unit, first_unit + anatomy.expert_width)


@contextmanager
def site_hooks(anatomy: Anatomy, hooks: Mapping[tuple[str, int], SiteHook]) -> Iterator[None]:
    """Context in which every forward pass calls ``hooks[site, layer]`` with the values at that site.

    A hook is called as ``hook(values, None)`` with values [rows, length, width].  For the neurons of
    a mixture (``mlp_act``, ``mlp_up``, ``mlp_in``) it is called as ``hook(values, routed)``, once for
    each expert that has tokens, with values [n, I]; the neurons of a shared expert and of a dense layer in such a
    model are groups that all tokens reach.  If it returns a tensor, of the same shape, that tensor replaces the
    values in the forward pass.  Values have the width of the site in all layers: where a layer has fewer, zeros
    follow.  A hook at a module that the layer does not have is never called, and what a hook at ``mlp_common`` or
    ``router_out`` returns is not used.  The path of a module in its layer is a site too: the module's output.

    Some models write into the values after the hook returns, so it must copy what it keeps.  For a model on
    several devices all hooks get values on one device.  If gradients are enabled, the values are on the path
    to the loss and ``values.register_hook`` works, even if all weights are frozen.

    Raises:
        BrocaError: an unknown site or layer, or, at the forward pass, a replacement of another shape.
    """
    for site, layer in hooks:
        in_model = 0 <= layer < anatomy.layers
        named = (*SITES, COMMON, *ROUTER_SITES)
        if not in_model or (site not in named and site not in _paths(anatomy, layer)):
            raise BrocaError(
                f"there is no site {site} in layer {layer}: sites are {', '.join(SITES)}, layers "
                f"0-{anatomy.layers - 1}"
            )
    where = anatomy.gathered_on
    if where is not None:
        hooks = {place: _gathered(hook, where) for place, hook in hooks.items()}
    with ExitStack() as open_now:
        routed: dict[int, dict[str, SiteHook]] = {}
        shapes: dict[int, _RowShape] = {}
        for (site, layer), hook in hooks.items():
            for placed, module, is_input in _placed(anatomy, site, layer, hook):
                if placed is None:
                    routed.setdefault(layer, {})[site] = hook
                    continue
                if layer not in shapes:
                    shapes[layer] = _RowShape()
                    block = anatomy.blocks[layer]
                    noted = block.register_forward_pre_hook(shapes[layer].note, with_kwargs=True)
                    open_now.callback(noted.remove)
                at_module = replace(placed, rows=shapes[layer])
                handle = (
                    module.register_forward_pre_hook(at_module.before)
                    if is_input
                    else module.register_forward_hook(at_module.after)
                )
                open_now.callback(handle.remove)
        if routed:
            experts = {_experts_of(anatomy, layer): by_site for layer, by_site in routed.items()}
            open_now.enter_context(_experts_hooked(experts))
        yield


def _paths(anatomy: Anatomy, layer: int) -> list[str]:
    return [path for path, _ in anatomy.blocks[layer].named_modules() if path]


def _gathered(hook: SiteHook, where: torch.device) -> SiteHook:
    """The hook with values on one device, for a model on several devices."""

    def on_one_device(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        moved = _moved(values, where)
        if moved is values:
            return hook(values, routed)
        if routed is not None:
            weights = None if routed.weights is None else _moved(routed.weights, where)
            routed = replace(routed, tokens=_moved(routed.tokens, where), weights=weights)
        offered = _replacement(hook, moved, routed)
        return None if offered is None else _moved(offered, values.device)

    return on_one_device


def _replacement(hook: SiteHook, values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
    """What replaces the values; with gradients at least the values themselves, which must be on the path to the loss."""
    replacement = hook(values, routed)
    return values if replacement is None and torch.is_grad_enabled() else replacement


def _moved(values: torch.Tensor, where: torch.device) -> torch.Tensor:
    return values.to(where)


def body(model: Any) -> nn.Module:
    """The model without its output embeddings: it gives last hidden states."""
    base: Any = model.base_model if model.base_model is not model else getattr(model, "model", None)
    # Llama 4's wrapper has a whole causal language model inside.
    module: nn.Module = body(model.get_decoder()) if base is None else base
    return module


def logits(
    model: Any, hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """The logits [..., vocabulary] of last hidden states [..., d] on their device, equal to
    ``model(...).logits``.

    Beyond the output embeddings this applies the family's module before them, and its scale and soft cap of the logits.

    Args:
        head: replaces the model's output embeddings.
    """
    text = model.config.get_text_config()
    layout = row_of(model.config) or _examined_once(model)
    if layout.head_transform is not None:
        hidden = model.get_submodule(layout.head_transform)(hidden)
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
    if layout.vocabulary is not None:
        made = made[..., : getattr(text, layout.vocabulary)]
    return made


# Layouts of models of unknown architecture: examined once, as logits are computed in chunks.
_examined: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def _examined_once(model: nn.Module) -> Layout:
    if model not in _examined:
        _examined[model] = examine(model)
    return _examined[model]


def replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Replace a module's ``forward`` until ``undo`` closes."""
    replaced = vars(module).get("forward")
    vars(module)["forward"] = forward
    if replaced is None:
        undo.callback(vars(module).pop, "forward")
    else:
        undo.callback(vars(module).__setitem__, "forward", replaced)


def _placed(
    anatomy: Anatomy, site: str, layer: int, hook: SiteHook
) -> Iterator[tuple[_ModuleHook | None, nn.Module, bool]]:
    """The hooks at modules that make a hook at a site, each with its module and whether it sees the input.

    None stands for the experts of a mixture, which have no module for each.
    """
    if site == COMMON:
        part = anatomy.common(layer, "mlp")
        if part is not None:
            yield from _showing(part, hook)
        return
    if site in ROUTER_SITES:
        router = anatomy.router(layer)
        if router is not None:
            own = hook if site == ROUTER_IN else _scoring(anatomy, layer, router, hook)
            yield _ModuleHook(own), router.module, True
        return
    if site not in SITES:
        yield _ModuleHook(hook), anatomy.blocks[layer].get_submodule(site), False
        return
    if site not in EXPERT_SITES and site != "attn_in":
        module = output_module(anatomy, site, layer)
        beside = _beside_mixture(anatomy, layer) if site == "mlp_out" else None
        if beside is not None:
            hook = _of_sum(hook)
        for one in (module, beside):
            if one is not None:
                yield _ModuleHook(hook), one, False
        return
    whole = anatomy.width(site)
    for part in anatomy.parts(layer, "attn" if site == "attn_in" else "mlp"):
        if part.experts is not None:
            yield None, part.module, False
            continue
        own = hook
        if site in EXPERT_SITES and anatomy.mixed:
            kept, factor = _factor_of(part)
            yield from kept
            own = _in_groups(hook, part.first // anatomy.expert_width, anatomy.expert_width, factor)
        elif part.width < whole:
            own = _padded(hook, whole)
        half = None if not part.halves else {"mlp_act": 0, "mlp_up": 1}.get(site)
        module, is_input = _module_of(part, site)
        yield _ModuleHook(own, half=half), module, is_input


def _beside_mixture(anatomy: Anatomy, layer: int) -> nn.Module | None:
    """The output module of a shared expert that the layer adds to the mixture's output; None without one."""
    names, mixture = anatomy.layout.shared, anatomy.layout.mixture
    shared = anatomy.shared[layer] if anatomy.shared else None
    inside = names is None or not names.added or names.output.startswith(f"{mixture}.")
    return None if shared is None or inside else shared[2]


def _of_sum(hook: SiteHook) -> SiteHook:
    """The hook of two modules with the sum of their outputs, called when both have run."""
    earlier: list[torch.Tensor] = []

    def on_sum(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        if not earlier:
            earlier.append(values)
            return None
        before = earlier.pop()
        offered = _replacement(hook, before + values, routed)
        return None if offered is None else offered - before

    return on_sum


def _showing(part: Part, hook: SiteHook) -> Iterator[tuple[_ModuleHook, nn.Module, bool]]:
    """The hooks that show the inputs of an MLP's output module, times the factor of its output."""
    kept, factor = _factor_of(part)

    def show(values: torch.Tensor, _: Routed | None) -> None:
        times = factor()
        hook(values if times is None else values * times, None)

    yield from kept
    yield _ModuleHook(show), part.module, True


def _factor_of(
    part: Part,
) -> tuple[list[tuple[_ModuleHook, nn.Module, bool]], Callable[[], torch.Tensor | None]]:
    """The hook that a part's factor needs, and what computes the factor [rows, length, 1]; none, and None, without one."""
    if part.factor is None or part.gate is None:
        return [], lambda: None
    factor, read = part.factor, list[torch.Tensor]()

    def keep(values: torch.Tensor, _: Routed | None) -> None:
        read[:] = [values]

    return [(_ModuleHook(keep), part.gate, True)], lambda: factor(read.pop()).sigmoid()


def _scoring(anatomy: Anatomy, layer: int, router: Part, hook: SiteHook) -> SiteHook:
    """The hook with the scores that a router computes from its input: routers differ in what they return."""
    bias, names = anatomy.bias_place(layer, router.path), anatomy.layout.router
    sigmoid = bias is not None and names is not None and names.sigmoid

    def show(values: torch.Tensor, _: Routed | None) -> None:
        weight = router.values.to(values.device, torch.float32)
        scores = nn.functional.linear(values.float(), weight)
        if sigmoid:
            scores = scores.sigmoid()
        elif bias is not None:
            scores = scores + parameter_value(*bias).to(scores.device, torch.float32)
        hook(scores, None)

    return show


def _module_of(part: Part, site: str) -> tuple[nn.Module, bool]:
    """The module of a site in a part, and whether the site is its input (else its output)."""
    module = {"mlp_act": part.gate, "mlp_up": part.up}.get(site)
    return (part.module, True) if module is None else (module, False)


def _experts_of(anatomy: Anatomy, layer: int) -> nn.Module:
    return anatomy.parts(layer, "mlp")[0].module


def _padded(hook: SiteHook, width: int) -> SiteHook:
    """The hook with zeros after the values of a layer that has fewer than ``width``."""

    def on_all(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        own = values.shape[-1]
        offered = _replacement(hook, nn.functional.pad(values, (0, width - own)), routed)
        return None if offered is None else offered[..., :own]

    return on_all


def _in_groups(
    hook: SiteHook, first_group: int, width: int, factor: Callable[[], torch.Tensor | None]
) -> SiteHook:
    """The hook with the neurons of an MLP that all tokens reach as groups of ``width``, like experts."""

    def on_groups(values: torch.Tensor, _: Routed | None) -> torch.Tensor | None:
        times = factor()
        weights = None if times is None else times.flatten()
        flat = values.flatten(0, -2)
        tokens = torch.arange(len(flat), device=flat.device)
        groups = list(flat.split(width, dim=-1))
        changed = False
        for at, group in enumerate(groups):
            # A copy, because hooks may write into the values.
            offered = _padded(hook, width)(group.clone(), Routed(first_group + at, tokens, weights))
            if offered is not None:
                groups[at], changed = offered.to(values.dtype), True
        return torch.cat(groups, dim=-1).view(values.shape) if changed else None

    return on_groups


class _RowShape:
    """(rows, length) of a layer's input: some layers flatten it."""

    def __init__(self) -> None:
        self.shape: torch.Size | None = None

    def note(self, _: nn.Module, arguments: Any, named: Any) -> None:
        self.shape = (arguments[0] if arguments else named["hidden_states"]).shape[-3:-1]


@dataclass(frozen=True)
class _ModuleHook:
    """A hook at one module."""

    hook: SiteHook
    rows: _RowShape = field(default_factory=_RowShape)
    half: int | None = None

    def before(self, _: nn.Module, inputs: tuple[Any, ...]) -> Any:
        changed = self._changed(inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    def after(self, _: nn.Module, __: Any, output: Any) -> Any:
        changed = self._changed(first(output))
        if changed is None:
            return None
        if isinstance(output, tuple | list):
            return type(output)((changed, *output[1:]))
        return changed

    def _changed(self, values: torch.Tensor) -> torch.Tensor | None:
        """The replacement of the values; None keeps them without a copy."""
        if self.half is None:
            return self._offered(values)
        parts = list(values.chunk(2, dim=-1))
        half = self._offered(parts[self.half])
        if half is None and not torch.is_grad_enabled():
            return None
        parts[self.half] = parts[self.half] if half is None else half
        return torch.cat(parts, dim=-1)

    def _offered(self, values: torch.Tensor) -> torch.Tensor | None:
        if values.ndim == 3 or self.rows.shape is None:
            return _offer(self.hook, values, None)
        if values.ndim == 4:
            # Several streams, of which the layers' modules read and write the first.
            offered = _offer(self.hook, values[0], None)
            return None if offered is None else torch.cat([offered[None], values[1:]])
        shape = values.shape
        offered = _offer(self.hook, values.view(*self.rows.shape, shape[-1]), None)
        return None if offered is None else offered.reshape(shape)


def _offer(hook: SiteHook, values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
    """Call a hook; its replacement of the values, or None.

    With gradients enabled there always is one: the hook's tensor, or the values passed to it, so that a
    gradient hook on them works.
    """
    tracked = torch.is_grad_enabled()
    leaf = tracked and not values.requires_grad
    if leaf:
        # The weights are frozen, so nothing before this site requires a gradient.
        values = values.detach().requires_grad_(True)
    replaced = hook(values, routed)
    if replaced is None:
        # A leaf cannot be written into, and some models add to a module's output in place.
        return (values.clone() if leaf else values) if tracked else None
    if replaced.shape != values.shape:
        raise BrocaError(
            f"a hook replaced values of shape {list(values.shape)} by values of shape {list(replaced.shape)}"
        )
    return replaced.to(values.dtype)


# experts module -> the hooks of its sites, in the order of their contexts
_hooks_of: dict[nn.Module, list[Mapping[str, SiteHook]]] = {}
# id of a config -> the experts forward that it selected before any hook
_selected: dict[int, str | None] = {}


@contextmanager
def _experts_hooked(hooks: Mapping[nn.Module, Mapping[str, SiteHook]]) -> Iterator[None]:
    """Context in which these experts modules call their hooks."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if _EXPERTS_FORWARD not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(_EXPERTS_FORWARD, _experts_forward)
    registered = [module for module in hooks if hasattr(module, "has_gate")]
    configs: dict[int, Any] = {id(module.config): module.config for module in registered}
    with ExitStack() as undo:
        for module in hooks:
            if module not in registered and module not in _hooks_of:
                replace_forward(module, partial(_sorted_forward, module), undo)
        for key, config in configs.items():
            before = config._experts_implementation_internal
            if before != _EXPERTS_FORWARD:
                _selected[key] = before
                undo.callback(_selected.pop, key)
                # Not through the property, which also sets the config's parts.
                config._experts_implementation_internal = _EXPERTS_FORWARD
                undo.callback(setattr, config, "_experts_implementation_internal", before)
        for module, of_module in hooks.items():
            _hooks_of.setdefault(module, []).append(of_module)
            undo.callback(_close, module, of_module)
        yield


def _close(module: nn.Module, of_module: Mapping[str, SiteHook]) -> None:
    kept = [hooks for hooks in _hooks_of.pop(module) if hooks is not of_module]
    if kept:
        _hooks_of[module] = kept


def _experts_forward(
    self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The stock eager forward of all experts of a mixture, with hooks.

    Args:
        self: the experts module: ``gate_up_proj`` [E, 2I, d], or ``up_proj`` [E, I, d] without a gate, and
            ``down_proj`` [E, d, I], both with their last two dimensions swapped if ``is_transposed``; gate and up
            interleaved unless ``is_concatenated``.
        hidden: [tokens, d].
        chosen: int64 [tokens, k], experts of each token.
        weights: [tokens, k], of the experts' outputs.
    """
    hooks = _hooks_of.get(self)
    if hooks is None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        # A layer without hooks uses the implementation that its config had selected.
        stock = ALL_EXPERTS_FUNCTIONS.get_interface(
            _selected[id(self.config)], type(self).forward.__wrapped__
        )
        unhooked: torch.Tensor = stock(self, hidden, chosen, weights)
        return unhooked
    out = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        # Expert parallelism marks experts on other devices with an index past the last one.
        if expert >= self.num_experts:
            continue
        tokens, place = torch.where(chosen == expert)
        routed = Routed(expert, tokens, weights[tokens, place])
        if self.has_gate:
            gate_up = _experts_linear(self, "gate_up_proj", hidden[tokens], expert)
            gated = self._apply_gate(_hook_halves(gate_up, self.is_concatenated, hooks, routed))
        else:
            before = _experts_linear(self, "up_proj", hidden[tokens], expert)
            for site in ("mlp_act", "mlp_up"):
                before = _hook_experts(hooks, site, before, routed)
            gated = self.act_fn(before)
        inside = _hook_experts(hooks, "mlp_in", gated, routed)
        written = _experts_linear(self, "down_proj", inside, expert)
        weighted = written * weights[tokens, place, None]
        out.index_add_(0, tokens, weighted.to(out.dtype))
    return out


def _sorted_forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The forward of experts that get every token times its router score, 0 for experts that are not chosen.

    Args:
        self: the experts module: ``gate_up_proj`` [E, d, 2I], the gate first, and ``down_proj`` [E, I, d].
        hidden: [E * tokens, d].
    """
    hooks = _hooks_of[self]
    of_experts = hidden.view(self.num_experts, -1, hidden.shape[-1])
    out = torch.zeros_like(of_experts)
    for expert in range(self.num_experts):
        tokens = of_experts[expert].any(-1).nonzero()[:, 0]
        if not len(tokens):
            continue
        routed = Routed(expert, tokens)
        gate, up = (of_experts[expert, tokens] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        gate = _hook_experts(hooks, "mlp_act", gate, routed)
        up = _hook_experts(hooks, "mlp_up", up, routed)
        inside = _hook_experts(hooks, "mlp_in", up * self.act_fn(gate), routed)
        out[expert].index_add_(0, tokens, inside @ self.down_proj[expert])
    return out.view(hidden.shape)


def _experts_linear(self: Any, name: str, inputs: torch.Tensor, expert: int) -> torch.Tensor:
    weight = getattr(self, name)[expert]
    made = inputs @ weight if self.is_transposed else nn.functional.linear(inputs, weight)
    return made + getattr(self, f"{name}_bias")[expert] if self.has_bias else made


def _hook_halves(
    gate_up: torch.Tensor, concatenated: bool, hooks: list[Mapping[str, SiteHook]], routed: Routed
) -> torch.Tensor:
    if not any(site in of_context for of_context in hooks for site in ("mlp_act", "mlp_up")):
        return gate_up
    gate, up = gate_up.chunk(2, dim=-1) if concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
    new_gate = _hook_experts(hooks, "mlp_act", gate, routed)
    new_up = _hook_experts(hooks, "mlp_up", up, routed)
    if new_gate is gate and new_up is up and not torch.is_grad_enabled():
        return gate_up
    if concatenated:
        return torch.cat([new_gate, new_up], dim=-1)
    return torch.stack([new_gate, new_up], dim=-1).flatten(-2)


def _hook_experts(
    hooks: list[Mapping[str, SiteHook]], site: str, values: torch.Tensor, routed: Routed
) -> torch.Tensor:
    for of_context in hooks:
        if site in of_context:
            offered = _offer(of_context[site], values, routed)
            values = values if offered is None else offered
    return values
