"""Sites of every known architecture: what is read there, what replaces it, and what a gradient says of it."""

import models
import pytest
import torch
from test_anatomy import IDS, MIXTURES
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from neurons.architectures.anatomy import EXPERT_SITES, SITES, anatomy_of
from neurons.architectures.layouts import LAYOUTS
from neurons.architectures.sites import Routed, logits, site_hooks
from neurons.errors import BrocaError

FAMILIES = list(models.FAMILIES)


@pytest.fixture(scope="module")
def model_of():
    """(model, anatomy) of a family, its weights frozen as ``load_model`` freezes them."""
    built = {}

    def build(family):
        if family not in built:
            torch.manual_seed(0)  # of the initial values, which the tests before would decide
            model = models.tiny_model(family).requires_grad_(False)
            built[family] = model, anatomy_of(model)
        return built[family]

    return build


def all_sites(anatomy, seen):
    def keep(at):
        def read(values, routed):
            seen[at if routed is None else (*at, routed.expert)] = values.clone()
            if routed is not None:
                seen["tokens", at[1], routed.expert] = routed.tokens

        return read

    return {(site, layer): keep((site, layer)) for site in SITES for layer in range(anatomy.layers)}


def activation_of(family, model):
    if family == "bloom":
        return lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    return ACT2FN[getattr(model.config.get_text_config(), LAYOUTS[family.partition("-")[0]].activation)]


def combined(family, model, act, up):
    """mlp_in from the two branches, by the family's definition."""
    if family == "gpt_oss":
        gate, up = act.clamp(max=1.5), up.clamp(-1.5, 1.5)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    made = activation_of(family, model)(act)
    return made * up if anatomy_of(model).gated else made


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_what_they_say(model_of, family):
    model, anatomy = model_of(family)
    seen, calls = {}, []
    with site_hooks(anatomy, all_sites(anatomy, seen)), torch.no_grad():
        found = model(IDS, output_hidden_states=True, use_cache=False)
    states = found.hidden_states
    rows, length = IDS.shape
    for layer in range(anatomy.layers):
        at = {site: seen.get((site, layer)) for site in SITES}
        for site in SITES:
            if family in MIXTURES and site in EXPERT_SITES:
                assert at[site] is None
            else:
                assert at[site].shape == (rows, length, anatomy.width(site))
        if family in MIXTURES:
            for expert in range(anatomy.experts):
                if ("mlp_in", layer, expert) not in seen:
                    continue
                act, up, into = (seen[site, layer, expert] for site in EXPERT_SITES)
                calls.append(len(into))
                assert into.shape == (len(seen["tokens", layer, expert]), anatomy.expert_width)
                torch.testing.assert_close(into, combined(family, model, act, up))
        else:
            torch.testing.assert_close(
                at["mlp_in"], combined(family, model, at["mlp_act"], at["mlp_up"]), rtol=1e-6, atol=1e-6
            )
            if not anatomy.gated:
                assert torch.equal(at["mlp_act"], at["mlp_up"])
            weight = anatomy.parts(layer, "mlp")[0].weight
            bias = getattr(anatomy.outputs["mlp"][layer], "bias", None)
            written = at["mlp_in"] @ weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(at["mlp_out"], written)
        bias = getattr(anatomy.outputs["attn"][layer], "bias", None)
        written = at["attn_in"] @ anatomy.parts(layer, "attn")[0].weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(at["attn_out"], written)
        if layer + 1 < anatomy.layers:
            assert torch.equal(at["block_out"], states[layer + 1])
        arrived = torch.allclose(
            at["block_out"], states[layer] + at["attn_out"] + at["mlp_out"], rtol=1e-4, atol=1e-4
        )
        assert arrived == anatomy.residual_output
    if family in MIXTURES:
        # Two of three experts for each token of each layer.
        assert sum(calls) == 2 * rows * length * anatomy.layers


@pytest.mark.parametrize("family", MIXTURES)
def test_tokens_are_those_that_the_router_sent(model_of, family):
    model, anatomy = model_of(family)
    chosen, seen = {}, {}

    def note(layer):
        def hook(_, inputs, output):
            indices = [part for part in output if not part.is_floating_point()]
            chosen[layer] = indices[0]

        return hook

    mixtures = [anatomy.mixtures[layer] for layer in range(3)]
    routers = [getattr(mixture, "router", None) or mixture.gate for mixture in mixtures]
    handles = [router.register_forward_hook(note(layer)) for layer, router in enumerate(routers)]
    with site_hooks(anatomy, all_sites(anatomy, seen)), torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    for layer in range(3):
        for expert in range(3):
            wanted = {token for token in range(IDS.numel()) if expert in chosen[layer][token].tolist()}
            tokens = seen.get(("tokens", layer, expert), torch.empty(0, dtype=torch.int64))
            assert tokens.dtype == torch.int64
            assert sorted(tokens.tolist()) == sorted(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_given_back_replace_the_values(model_of, family):
    """Added at mlp_out or attn_out of the last layer, a vector shows in block_out; copies change nothing."""
    model, anatomy = model_of(family)
    last = anatomy.layers - 1
    with torch.no_grad():
        plain = model(IDS).logits
        same = {(site, layer): lambda v, routed: v.clone() for site in SITES for layer in range(3)}
        with site_hooks(anatomy, same):
            torch.testing.assert_close(model(IDS).logits, plain)
        for site in SITES:
            changed = {(site, last): lambda v, routed: v + torch.linspace(-1, 2, v.shape[-1])}
            with site_hooks(anatomy, changed):
                assert float((model(IDS).logits - plain).abs().max()) > 1e-3
        seen = {}
        wanted = {
            ("mlp_out", last): lambda v, routed: v + 3,
            ("block_out", last): lambda v, routed: seen.__setitem__("after", v.clone()),
        }
        with site_hooks(anatomy, {("block_out", last): lambda v, _: seen.__setitem__("before", v.clone())}):
            model(IDS)
        with site_hooks(anatomy, wanted):
            model(IDS)
        moved = torch.allclose(seen["after"], seen["before"] + 3, rtol=1e-4, atol=1e-4)
        assert moved == anatomy.residual_output
        assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("site", ["mlp_act", "mlp_up", "mlp_in", "attn_in", "mlp_out", "block_out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_slopes_of_the_loss(model_of, family, site):
    """With frozen weights: against the gradient of a zero that is added, and central differences."""
    model, anatomy = model_of(family)
    layer, step, gradients, added = 1, 5e-3, {}, {}

    def loss():
        hidden = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        return logits(model, hidden).log_softmax(-1)[0, :, 7].sum()

    def record(values, routed):
        assert values.requires_grad
        key = -1 if routed is None else routed.expert
        values.register_hook(lambda gradient: gradients.__setitem__(key, gradient.clone()))

    def add_zero(values, routed):
        key = -1 if routed is None else routed.expert
        added[key] = torch.zeros_like(values).requires_grad_(True)
        return values + added[key]

    with site_hooks(anatomy, {(site, layer): record}):
        loss().backward()
    with site_hooks(anatomy, {(site, layer): add_zero}):
        loss().backward()
    assert gradients.keys() == added.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, added[key].grad, rtol=1e-3, atol=1e-4)
        assert float(gradient.norm()) > 1e-3

        def moved(size, key=key, gradient=gradient):
            def move(values, routed):
                same = key == (-1 if routed is None else routed.expert)
                return values + size * gradient / gradient.norm() if same else None

            with site_hooks(anatomy, {(site, layer): move}), torch.no_grad():
                return float(loss())

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert slope == pytest.approx(float(gradient.norm()), rel=0.05, abs=5e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["phi3", "mixtral", "gpt_oss", "opt"])
def test_without_gradients_nothing_is_copied(model_of, family):
    model, anatomy = model_of(family)
    inside, given = {}, {}
    if family in MIXTURES:
        module = anatomy.gates[0]
        stock = type(module)._apply_gate

        def remember(gate_up):
            inside.setdefault("storage", set()).add(gate_up.untyped_storage().data_ptr())
            return stock(module, gate_up)

        module._apply_gate = remember
    else:
        handle = anatomy.gates[0].register_forward_hook(
            lambda _, __, output: inside.__setitem__("storage", {output.untyped_storage().data_ptr()})
        )

    def read(site):
        def reader(values, routed):
            given.setdefault(site, set()).add(values.untyped_storage().data_ptr())
            given.setdefault("kept", []).append(values)

        return reader

    with (
        torch.no_grad(),
        site_hooks(anatomy, {("mlp_act", 0): read("mlp_act"), ("mlp_up", 0): read("mlp_up")}),
    ):
        model(IDS)
    if family in MIXTURES:
        del module._apply_gate
    else:
        handle.remove()
    assert given["mlp_act"] == given["mlp_up"] == inside["storage"]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", MIXTURES)
def test_reading_experts_computes_what_the_stock_forward_computes(family, implementation):
    model = models.tiny_model(family)
    anatomy = anatomy_of(model)
    model.set_experts_implementation(implementation)
    config = model.config
    with torch.no_grad():
        plain = model(IDS).logits
        # One layer read, so that the others go the chosen way, then all of them.
        for layers in ([1], range(3)):
            readers = {("mlp_in", layer): lambda values, routed: None for layer in layers}
            with site_hooks(anatomy, readers):
                assert config._experts_implementation != implementation
                torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-5, atol=1e-5)
            assert config._experts_implementation == implementation
        assert torch.equal(model(IDS).logits, plain)
        with site_hooks(anatomy, {("attn_in", 0): lambda values, routed: None}):
            assert config._experts_implementation == implementation
            assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("family", MIXTURES)
def test_unread_layers_take_the_stock_way(family, monkeypatch):
    model = models.tiny_model(family)
    anatomy = anatomy_of(model)
    model.set_experts_implementation("batched_mm")
    called = []
    stock = ALL_EXPERTS_FUNCTIONS["batched_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping,
        "batched_mm",
        lambda self, *given: called.append(self) or stock(self, *given),
    )
    with torch.no_grad(), site_hooks(anatomy, {("mlp_act", 1): lambda values, routed: None}):
        model(IDS)
    assert called == [anatomy.gates[0], anatomy.gates[2]]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_oss", "mixtral"])
def test_readings_inside_each_other_see_what_the_outer_ones_left(model_of, family):
    model, anatomy = model_of(family)
    before = model.config._experts_implementation
    seen, outer = [], []
    with torch.no_grad(), site_hooks(anatomy, {("mlp_up", 0): lambda v, routed: torch.full_like(v, 2.0)}):
        with site_hooks(anatomy, {("mlp_up", 0): lambda v, routed: seen.append(v.clone())}):
            model(IDS)
        assert seen
        assert all(bool((values == 2).all()) for values in seen)
        count = len(seen)
        with site_hooks(anatomy, {("mlp_in", 0): lambda v, routed: outer.append(v.clone())}):
            model(IDS)
    model(IDS)
    assert len(seen) == len(outer) == count
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_error_in_a_reader_leaves_the_model_as_it_was(family):
    model = models.tiny_model(family)
    anatomy = anatomy_of(model)
    before = model.config._experts_implementation
    with torch.no_grad():
        plain = model(IDS).logits

        def fail(values, routed):
            raise ZeroDivisionError

        with (
            pytest.raises(ZeroDivisionError),
            site_hooks(anatomy, {("mlp_in", 1): fail, ("block_out", 0): lambda v, routed: None}),
        ):
            model(IDS)
        assert torch.equal(model(IDS).logits, plain)
    assert model.config._experts_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_hidden_states_are_the_models(model_of, family):
    model, _ = model_of(family)
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS, attention_mask=None, use_cache=False).last_hidden_state
        torch.testing.assert_close(logits(model, hidden), model(IDS).logits)
        if family in ("gemma2", "cohere"):
            plain = model.get_output_embeddings()(hidden)
            assert float((plain - model(IDS).logits).abs().max()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_move_what_is_read(model_of, family):
    """A mask for padding on the right goes through base_model, as recording gives it."""
    model, anatomy = model_of(family)
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    seen = {}
    for name, ids, given in (("padded", IDS, mask), ("short", IDS[1:, :6], None)):
        readers = {("attn_in", 2): lambda v, routed, name=name: seen.__setitem__(name, v.clone())}
        with torch.no_grad(), site_hooks(anatomy, readers):
            model.base_model(input_ids=ids, attention_mask=given, use_cache=False)
    torch.testing.assert_close(seen["padded"][1:, :6], seen["short"])


def test_what_is_wrong_is_refused(model_of):
    model, anatomy = model_of("llama")
    for at in (("mlp_on", 0), ("mlp_in", 3), ("mlp_in", -1)):
        with (
            pytest.raises(BrocaError, match="there is no site"),
            site_hooks(anatomy, {at: lambda v, r: None}),
        ):
            pass
    for family in ("llama", "mixtral"):
        model, anatomy = model_of(family)
        with (
            pytest.raises(BrocaError, match="shape"),
            site_hooks(anatomy, {("mlp_in", 0): lambda v, routed: v[..., 1:]}),
            torch.no_grad(),
        ):
            model(IDS)


def test_a_routed_reader_knows_its_expert(model_of):
    model, anatomy = model_of("qwen3_moe")
    seen = []
    with torch.no_grad(), site_hooks(anatomy, {("mlp_act", 1): lambda v, routed: seen.append(routed)}):
        model(IDS)
    assert all(isinstance(routed, Routed) for routed in seen)
    assert [routed.expert for routed in seen] == sorted({routed.expert for routed in seen})
