"""Self-check of an anatomy: zeroing a component at its site must equal zeroing its weight.

Zeroing one input of a linear module and zeroing the column of its weight that reads this input are the
same computation.  If the logits agree, and differ from those of the unedited model, then the site, the
module and the columns belong together.  Four more checks: act(mlp_act) * mlp_up is mlp_in; no linear module
runs after the output module in its parent; a vector added to the output of a module that writes to the
residual stream unchanged arrives there, times the layout's multiplier; and ``logits`` of the last hidden states are
the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from neurons.architectures.anatomy import BLOCKS, COMMON, Anatomy, Part, anatomy_of
from neurons.architectures.attention import LAYER_KINDS
from neurons.architectures.auto_class import auto_class
from neurons.architectures.layouts import Layout
from neurons.architectures.sites import Routed, SiteHook, body, logits, site_hooks
from neurons.errors import BrocaError, first_line

# Tolerance for rounding between hook and weight, as a fraction of the change of the logits.
_TOLERANCE = 1e-2
# Tolerance for bfloat16, as a fraction of what is added; a norm or a factor in between gives a much larger error.
_ARRIVES = 0.02
_ROWS, _LENGTH = 2, 8
_MAX_DEPTH = 8  # of a random model
# Maximum parameters of a random model: more take too long to initialise.
_MAX_PARAMETERS = 300_000_000


def example_ids(vocabulary: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Token ids [2, 8] for a check, from all parts of the vocabulary."""
    count = _ROWS * _LENGTH
    ids = torch.arange(count, dtype=torch.int64) * 7919 % max(1, vocabulary - 1) + 1
    return (ids % vocabulary).view(_ROWS, _LENGTH).to(device)


@torch.no_grad()
def self_check(model: Any, anatomy: Anatomy, ids: torch.Tensor) -> None:
    """Check that an anatomy fits its model; the model is bit-identical afterwards.

    Checks the first, the middle and the last layer and one of each kind, each with the neuron and the head of largest
    contribution (of a mixture, a neuron in an expert that gets tokens, and one of the shared expert).

    Args:
        model: causal language model in eval mode.
        ids: int64 [rows, length], tokens without padding, on the model's device.

    Raises:
        BrocaError: names the layer and the module that do not fit.
    """
    _check_rows(model, anatomy, ids)
    _check_modules(model, anatomy, ids)


@torch.no_grad()
def _check_modules(model: Any, anatomy: Anatomy, ids: torch.Tensor) -> None:
    for layer in checked_layers(anatomy):
        _check_order(model, anatomy, layer, ids)
        if anatomy.has(layer, "mlp") and not gating_holds(model, anatomy, layer, ids):
            raise _wrong(anatomy, layer, "mlp", "its input is not the activation of its gate")
        for block in BLOCKS:
            for part in anatomy.parts(layer, block):
                check_silence(model, anatomy, layer, block, part, ids)
    changed = _changed_on_its_way(model, anatomy, ids) if anatomy.residual_output else None
    if changed is not None:
        block, layer = changed
        raise _wrong(anatomy, layer, block, "its output does not reach the residual stream unchanged")
    plain = model(input_ids=ids, use_cache=False).logits
    made = logits(model, body(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if plain.shape != made.shape or not torch.allclose(plain.float(), made.float(), rtol=1e-2, atol=1e-4):
        raise BrocaError(
            f"{anatomy.model_type}: the model changes its logits after the output embeddings in a way that "
            "Broca does not support, so losses would be wrong"
        )


def _check_rows(model: Any, anatomy: Anatomy, ids: torch.Tensor) -> None:
    """Every layer runs and gives one vector of the residual's width for each token."""
    shapes: dict[int, list[int]] = {}

    def keep(layer: int) -> SiteHook:
        return lambda values, _: shapes.__setitem__(layer, list(values.shape))

    with site_hooks(anatomy, {("block_out", layer): keep(layer) for layer in range(anatomy.layers)}):
        body(model)(input_ids=ids, use_cache=False)
    if idle := sorted({*range(anatomy.layers)} - {*shapes}):
        raise BrocaError(
            f"{anatomy.model_type}: layers {', '.join(map(str, idle))} do not run on text without images: "
            "Broca edits models of which every layer does"
        )
    expected = [*ids.shape, anatomy.residual]
    for layer, shape in shapes.items():
        if shape != expected:
            raise BrocaError(
                f"{anatomy.model_type}, layer {layer}: its output has the shape {shape} instead of {expected} (rows, "
                "tokens, width): the positions come first, or there is more than one residual stream"
            )


def checked_layers(anatomy: Anatomy) -> tuple[int, ...]:
    """The first, the middle and the last layer, and the first of each kind of layer."""
    last = anatomy.layers - 1
    of_kind: dict[Any, int] = {}
    for layer in range(anatomy.layers):
        paths = tuple(part.path for block in BLOCKS for part in anatomy.parts(layer, block))
        of_kind.setdefault((anatomy.attention[layer], anatomy.head_dims[layer], paths), layer)
    return tuple(sorted({0, last // 2, last, *of_kind.values()}))


def writes_to_residual(model: Any, anatomy: Anatomy, ids: torch.Tensor) -> bool:
    """Whether vectors added to the outputs of MLP and attention arrive in the residual stream, times the layout's
    multipliers (the last layer with each)."""
    return _changed_on_its_way(model, anatomy, ids) is None


def _changed_on_its_way(model: Any, anatomy: Anatomy, ids: torch.Tensor) -> tuple[str, int] | None:
    """A block, and the last layer with it, for which ``writes_to_residual`` does not hold."""
    for block in ("mlp", "attn"):
        for layer in anatomy.layers_with(block)[-1:]:
            factor = residual_factor(model, anatomy, f"{block}_out", layer, ids)
            if factor is None or abs(factor / anatomy.multiplier(block) - 1) > _ARRIVES:
                return block, layer
    return None


@torch.no_grad()
def residual_factor(model: Any, anatomy: Anatomy, site: str, layer: int, ids: torch.Tensor) -> float | None:
    """The number by which a layer multiplies a vector on its way from a site to ``block_out``.

    ``mlp_out`` has the same values with the vector as without, so what the MLP makes of the attention's does not count.

    Args:
        model: causal language model.
        site: "attn_out", "mlp_out", or the path of a module after one of them in the layer, as a norm.
        ids: int64 [rows, length], tokens without padding, on the model's device.

    Returns:
        The number, to four digits; None if the vector arrives changed in another way.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> SiteHook:
        return lambda values, _: kept.__setitem__(name, values.float().clone())

    with site_hooks(anatomy, {("block_out", layer): keep("before"), ("mlp_out", layer): keep("mlp_out")}):
        body(model)(input_ids=ids, use_cache=False)
    # A power of 2, so that no dtype rounds what is added.
    size = kept["before"].abs().mean().log2().round().exp2()
    added = size * torch.where(torch.arange(anatomy.residual, device=size.device) % 3 == 0, 4.0, -2.0)
    hooks: dict[tuple[str, int], SiteHook] = {
        ("block_out", layer): keep("after"),
        ("mlp_out", layer): lambda values, _: kept["mlp_out"],
        (site, layer): lambda values, _: values + added.to(values.device, values.dtype),
    }
    with site_hooks(anatomy, hooks):
        body(model)(input_ids=ids, use_cache=False)
    change = kept["after"] - kept["before"]
    factor = change.mean((0, 1)) @ added / (added @ added)
    error = (change - factor * added).abs().mean()
    return _rounded(factor) if error < _ARRIVES * (factor * added).abs().mean() else None


def _rounded(factor: torch.Tensor) -> float:
    """Without the noise of the measurement, which differs between devices."""
    return float(f"{float(factor):.4g}")


@torch.no_grad()
def adds_shared(model: Any, anatomy: Anatomy, ids: torch.Tensor) -> bool:
    """Whether ``mlp_common`` of the first mixture with a shared expert is all that its weight adds to the residual."""
    layer = next((at for at in range(anatomy.layers) if anatomy.mixed_in(at) and anatomy.shared[at]), None)
    if layer is None:
        return False
    part = anatomy.parts(layer, "mlp")[1]
    kept: dict[str, torch.Tensor] = {}

    def keep(site: str) -> SiteHook:
        return lambda values, _: kept.__setitem__(site, values.float().clone())

    def silence(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        assert routed is not None
        return values * 0 if routed.expert * anatomy.expert_width >= part.first else None

    hooks = {(COMMON, layer): keep(COMMON), ("block_out", layer): keep("with")}
    with site_hooks(anatomy, {**hooks, ("mlp_in", layer): lambda values, _: None}):
        body(model)(input_ids=ids, use_cache=False)
    with site_hooks(anatomy, {("block_out", layer): keep("without"), ("mlp_in", layer): silence}):
        body(model)(input_ids=ids, use_cache=False)
    added = kept[COMMON] @ part.values.float().T
    error = (kept["with"] - kept["without"] - added).abs().mean()
    return bool((error <= _ARRIVES * added.abs().mean()).item())


@torch.no_grad()
def mixture_factor(model: Any, anatomy: Anatomy, layer: int, ids: torch.Tensor) -> float | None:
    """The number by which a mixture multiplies the sum of its routed experts' outputs, each times the router's weight.

    Args:
        model: causal language model.
        layer: a layer with a mixture.
        ids: int64 [rows, length], tokens without padding, on the model's device.

    Returns:
        The number, to four digits; None if silencing the experts changes ``mlp_out`` in another way.
    """
    part, width = anatomy.parts(layer, "mlp")[0], anatomy.expert_width
    weight = part.values
    kept: dict[str, torch.Tensor] = {}
    total = torch.zeros(ids.numel(), anatomy.residual, device=ids.device)

    def keep(name: str) -> SiteHook:
        return lambda values, _: kept.__setitem__(name, values.float().flatten(0, -2).clone())

    def add_up(values: torch.Tensor, routed: Routed | None) -> None:
        assert routed is not None
        first = routed.expert * width
        if first < part.width:
            added = values.float() @ part.cut(weight, slice(first, first + width)).to(values.device).float().T
            added = added if routed.weights is None else added * routed.weights.float()[:, None]
            total.index_add_(0, routed.tokens.to(total.device), added.to(total.device))

    def silence(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        assert routed is not None
        return values * 0 if routed.expert * width < part.width else None

    with site_hooks(anatomy, {("mlp_in", layer): add_up, ("mlp_out", layer): keep("with")}):
        body(model)(input_ids=ids, use_cache=False)
    with site_hooks(anatomy, {("mlp_in", layer): silence, ("mlp_out", layer): keep("without")}):
        body(model)(input_ids=ids, use_cache=False)
    change = (kept["with"] - kept["without"]).to(total.device)
    factor = (change * total).sum() / total.square().sum()
    error = (change - factor * total).abs().mean()
    return _rounded(factor) if error < _ARRIVES * (factor * total).abs().mean() else None


def checked(model: Any, anatomy: Anatomy) -> Anatomy:
    """Self-check an examined anatomy on its model.

    Returns:
        The anatomy with the measured ``residual`` of the layout, and ``added`` of its shared expert.

    Raises:
        BrocaError: the anatomy does not fit, or the model cannot run.
    """
    ids = example_ids(model.config.get_text_config().vocab_size, model.get_input_embeddings().weight.device)
    try:
        _check_rows(model, anatomy, ids)
        residual = writes_to_residual(model, anatomy, ids)
        anatomy = replace(anatomy, layout=replace(anatomy.layout, residual=residual))
        if (shared := anatomy.layout.shared) is not None:
            shared = replace(shared, added=adds_shared(model, anatomy, ids))
            anatomy = replace(anatomy, layout=replace(anatomy.layout, shared=shared))
        if not all(
            gating_holds(model, anatomy, layer, ids)
            for layer in checked_layers(anatomy)
            if anatomy.has(layer, "mlp")
        ):
            # The config's activation is not all of it, as with a clamp: then only signs are checked.
            anatomy = replace(anatomy, layout=replace(anatomy.layout, activation=None))
        _check_modules(model, anatomy, ids)
    except BrocaError:
        raise
    # A model of unknown architecture may raise anything.
    except Exception as error:
        raise BrocaError(
            f"architecture {anatomy.model_type!r} is not in the table, and the self-check of its anatomy could "
            f"not run ({type(error).__name__}: {first_line(error)})"
        ) from error
    return anatomy


def checked_on_small_model(config: Any, layout: Layout) -> Layout:
    """Self-check an architecture without its weights, on a small random model of the same config class.

    The model has two layers and a small vocabulary.  It is also narrow if the architecture allows it;
    otherwise it has the config's own widths.

    Args:
        config: of the real model.
        layout: of the real model, examined without its weights.

    Returns:
        The layout with the measured ``residual``.

    Raises:
        BrocaError: the architecture fails the check, or no small model can be built.
    """
    try:
        return _checked_small(config, layout, narrow=True)
    except BrocaError:
        return _checked_small(config, layout, narrow=False)


def _checked_small(config: Any, layout: Layout, narrow: bool) -> Layout:
    try:
        model = _small_model(config, narrow)
    # A config class may raise anything for these sizes.
    except Exception as error:
        raise BrocaError(
            f"architecture {config.model_type!r} is not in the table, and no small model could be built to "
            f"check its anatomy ({type(error).__name__}: {first_line(error)})"
        ) from error
    anatomy = anatomy_of(model)
    if not _compatible(anatomy.layout, layout):
        raise BrocaError(
            f"architecture {config.model_type!r} is not in the table, and a small model of it has another "
            f"anatomy: {dict(anatomy.layout.outputs)} instead of {dict(layout.outputs)}"
        )
    found = checked(model, anatomy).layout
    return replace(layout, residual=found.residual, activation=found.activation, shared=found.shared)


def _compatible(small: Layout, whole: Layout) -> bool:
    """Whether the small model's parts are the whole model's, which may have more kinds of layers."""
    if small.mixture is None and whole.mixture is not None:
        names = None if whole.dense is None else (whole.dense.output, whole.dense.gate, whole.dense.up)
        return (small.outputs["mlp"], small.gate, small.up) == names
    same = ("layers", "gate", "up", "mixture", "transposed")
    return small.outputs == whole.outputs and all(
        getattr(small, name) == getattr(whole, name) for name in same
    )


def _small_model(config: Any, narrow: bool) -> Any:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = _kinds_of_few(text)
    sizes: dict[str, Any] = {
        "num_hidden_layers": _depth(text, kinds),
        "first_k_dense_replace": 1,
        "num_kv_shared_layers": 0,
        "vocab_size": min(text.vocab_size, 512),
    }
    if narrow:
        shared = max(1, text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or 1))
        heads = 4 if shared < 4 else 8
        sizes |= {
            "hidden_size": 16 * heads,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // min(shared, heads),
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 40,
        }
    for name, value in sizes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    vision: Any = getattr(small, "vision_config", None)
    if getattr(vision, "num_hidden_layers", None) is not None:
        vision.num_hidden_layers = 1
    for name, of_layers in kinds.items():
        setattr(text, name, of_layers)
    for holder in (small, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(getattr(holder, name, None), int) and getattr(holder, name) >= text.vocab_size:
                setattr(holder, name, None)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class(small).from_config(small).parameters())
    if size > _MAX_PARAMETERS:
        raise BrocaError(
            f"two of its layers have {size:.1e} parameters, more than the maximum of {_MAX_PARAMETERS:.0e}"
        )
    model = auto_class(small).from_config(small, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                # Factors that begin at 1 are learned: they must not look as if they changed nothing.
                parameter.mul_(1 + 0.3 * noise)
    return model.requires_grad_(False)


def _depth(text: Any, kinds: Mapping[str, Sequence[str]]) -> int:
    """Layers of a small model: as many as kinds are given, or two, or enough where a config computes the kinds."""
    if kinds:
        return max(map(len, kinds.values()))
    computed = [
        list(dict.fromkeys(of)) for name in LAYER_KINDS if isinstance(of := getattr(text, name, None), list)
    ]
    return min(_MAX_DEPTH, text.num_hidden_layers) if any(len(of) > 1 for of in computed) else 2


def _kinds_of_few(text: Any) -> dict[str, list[str]]:
    """The config's lists of the kinds of layers, cut to the last layers such that all kinds of each occur."""
    lists = {
        name: kinds
        for name in LAYER_KINDS
        if isinstance(kinds := getattr(text, name, None), list)
        # Some configs compute them from other settings.
        and not isinstance(getattr(type(text), type(text).attribute_map.get(name, name), None), property)
    }
    depth = 2
    while any(set(kinds[-depth:]) != set(kinds) for kinds in lists.values()) and depth < _MAX_DEPTH:
        depth += 1
    return {name: kinds[-depth:] for name, kinds in lists.items()}


def check_silence(
    model: Any, anatomy: Anatomy, layer: int, block: str, part: Part, ids: torch.Tensor
) -> None:
    """Check that silencing a component at its site and in its weight gives the same logits.

    Takes the component of largest contribution in a part of the layer's weight.

    Raises:
        BrocaError: it changes nothing, or the two differ.
    """
    site = f"{block}_in"
    totals = torch.zeros(anatomy.width(site), dtype=torch.float64, device=ids.device)

    def sum_up(values: torch.Tensor, routed: Routed | None) -> None:
        amount = values.abs().flatten(0, -2).sum(0, dtype=torch.float64)
        start = 0 if routed is None else routed.expert * anatomy.expert_width
        totals[start : start + len(amount)] += amount

    # Always with a hook, so that a mixture uses the same implementation of its experts each time.
    plain = _logits_of(model, anatomy, (site, layer), sum_up, ids)
    width = anatomy.component_width(block, layer)
    # Weighted by the norm of the weight, which an edit may have zeroed.
    contribution = totals[part.columns] * part.weight.norm(dim=-2).flatten().double()
    component = part.first // width + int(contribution.view(-1, width).sum(1).argmax())
    columns = slice(component * width, (component + 1) * width)

    def silence(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        start = 0 if routed is None else routed.expert * anatomy.expert_width
        if not start <= columns.start < start + values.shape[-1]:
            return None
        values = values.clone()
        values[..., columns.start - start : columns.stop - start] = 0
        return values

    by_hook = _logits_of(model, anatomy, (site, layer), silence, ids)
    with _zeroed(anatomy, layer, block, columns):
        by_weight = _logits_of(model, anatomy, (site, layer), lambda values, routed: None, ids)
    change = (by_hook - plain).abs().max()
    name = f"{anatomy.component_name(block)} {component}"
    if not bool(change > 0):
        raise _wrong(anatomy, layer, block, f"silencing {name} at its input changes nothing")
    if not bool((by_hook - by_weight).abs().max() <= _TOLERANCE * change):
        raise _wrong(anatomy, layer, block, f"silencing {name} by its weight does not do what its input does")


def gating_holds(model: Any, anatomy: Anatomy, layer: int, ids: torch.Tensor) -> bool:
    """Whether act(mlp_act) * mlp_up is mlp_in, or has its sign where the config does not name the activation.

    For a family of the table without a name it is not checked.
    """
    named = anatomy.layout.activation
    if named is None and not anatomy.layout.examined:
        return True
    from transformers.activations import ACT2FN

    activation: Callable[[torch.Tensor], torch.Tensor] = (
        torch.sign if named is None else ACT2FN[getattr(model.config.get_text_config(), named)]
    )
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def keep(site: str) -> SiteHook:
        def hook(values: torch.Tensor, routed: Routed | None) -> None:
            seen[site, -1 if routed is None else routed.expert] = values.clone()

        return hook

    sites = ("mlp_act", "mlp_up", "mlp_in")
    with site_hooks(anatomy, {(site, layer): keep(site) for site in sites}):
        body(model)(input_ids=ids, use_cache=False)
    for (site, expert), values in seen.items():
        if site != "mlp_in":
            continue
        made, up = activation(seen["mlp_act", expert]), seen["mlp_up", expert]
        if made.shape != values.shape:
            return False
        if named is None:
            made = made * up.sign() if anatomy.gated else made
            # Values near 0 may have been rounded to it.
            clear = values.abs() > 1e-3 * values.abs().max()
            if not torch.equal(made[clear] > 0, values[clear] > 0):
                return False
            continue
        made = made * up if anatomy.gated else made
        if not torch.allclose(
            made.float(), values.float(), rtol=2e-2, atol=1e-3 * float(values.detach().abs().max())
        ):
            return False
    return bool(seen)


def _check_order(model: Any, anatomy: Anatomy, layer: int, ids: torch.Tensor) -> None:
    """The output module is in its layer and is the last linear module to run in its parent."""
    inside = {module: path for path, module in anatomy.blocks[layer].named_modules()}
    ran: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for module in inside
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    try:
        body(model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for block, part in [(name, part) for name in BLOCKS for part in anatomy.parts(layer, name)]:
        output = part.module
        if output not in inside:
            raise _wrong(anatomy, layer, block, "its output module is not in the layer")
        if part.experts is not None:
            continue
        parent = inside[output].rpartition(".")[0]
        beside = [module for module in ran if inside[module].startswith(f"{parent}." if parent else "")]
        if not beside or beside[-1] is not output:
            last = inside[beside[-1]] if beside else "none"
            raise _wrong(anatomy, layer, block, f"the last linear module that runs is {last}")


def _logits_of(
    model: Any, anatomy: Anatomy, at: tuple[str, int], hook: SiteHook, ids: torch.Tensor
) -> torch.Tensor:
    with site_hooks(anatomy, {at: hook}):
        made: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return made


@contextmanager
def _zeroed(anatomy: Anatomy, layer: int, block: str, columns: slice) -> Iterator[None]:
    weight = anatomy.columns(layer, block, columns)
    kept = weight.clone()
    try:
        weight.zero_()
        yield
    finally:
        weight.copy_(kept)


def _wrong(anatomy: Anatomy, layer: int, block: str, what: str) -> BrocaError:
    return BrocaError(
        f"{anatomy.model_type}, layer {layer}, {block} ({anatomy.layout.outputs[block]}): {what}; the "
        "anatomy of this architecture is not known"
    )
