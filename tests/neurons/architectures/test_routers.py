"""Routers of every family of mixtures: found, read, and named as on disk; a bias of theirs changes which experts are chosen."""

import pytest
import torch
from test_families import IDS, logits_of, saved

from editing.checkpoints.export import export
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from editing.plans.weights import Weights
from neurons.architectures.anatomy import ROUTER_IN, ROUTER_OUT
from neurons.architectures.layouts import LAYOUTS
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError
from neurons.models.source import load_model

MIXTURES = sorted(name for name, layout in LAYOUTS.items() if layout.mixture is not None)
# Their biases are added to the sigmoids of the scores, and those of gpt-oss to the scores.
CHOOSING = {
    *("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "dots1", "nemotron_h"),
    *("minimax_m2", "minimax_m3_vl_text", "kimi_linear", "lfm2_moe"),
}  # fmt: skip


def chosen_and_read(loaded):
    """(layer, token) -> the experts with tokens there, by hooks on experts; layer -> router's input and scores."""
    anatomy, routed, read = loaded.anatomy, {}, {}
    hooks = {}
    for layer in (at for at in range(anatomy.layers) if anatomy.router(at) is not None):

        def at_experts(values, where, layer=layer):
            for token in where.tokens.tolist():
                routed.setdefault((layer, token), set()).add(where.expert)

        hooks["mlp_in", layer] = at_experts
        for site in (ROUTER_IN, ROUTER_OUT):
            hooks[site, layer] = lambda values, _, place=(site, layer): read.__setitem__(
                place, values.clone()
            )
    with torch.no_grad(), site_hooks(anatomy, hooks):
        loaded.model(input_ids=IDS, use_cache=False)
    return routed, read


@pytest.mark.parametrize("model_type", MIXTURES)
def test_scores_choose_the_experts(tmp_path, model_type):
    loaded = load_model(saved(model_type, tmp_path), device="cpu")
    anatomy = loaded.anatomy
    routers = {layer: part for layer in range(anatomy.layers) if (part := anatomy.router(layer)) is not None}
    assert routers and anatomy.width(ROUTER_IN) == anatomy.residual
    routed, read = chosen_and_read(loaded)
    for layer, part in routers.items():
        experts = anatomy.parts(layer, "mlp")[0].experts
        inputs, scores = read[ROUTER_IN, layer], read[ROUTER_OUT, layer]
        assert inputs.shape == (*IDS.shape, anatomy.residual) and scores.shape == (*IDS.shape, experts)
        assert torch.equal(Weights(loaded).read(layer, part.path).float(), part.weight)
        expected = inputs.double() @ part.weight.double().T
        bias = anatomy.output_bias(layer, part.path)
        if model_type in CHOOSING:
            expected = 1 / (1 + torch.exp(-expected))
        elif bias is not None:
            expected = expected + bias.double()
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
        assert (bias is not None) == (model_type in CHOOSING or model_type == "gpt_oss")
        if bias is not None:
            name = Weights(loaded).bias(layer, part.path).name
            assert name.endswith(("bias",)) and f".{layer}." in name
        if model_type == "ernie4_5_moe":
            # Its bias is a row [1, E], which no plan changes.
            expected = expected.softmax(-1) + part.module.moe_statics.e_score_correction_bias.squeeze()
        ranked = (
            (expected + bias if model_type in CHOOSING else expected).flatten(0, 1).argsort(descending=True)
        )
        for token, order in enumerate(ranked.tolist()):
            own = {expert for expert in routed[layer, token] if expert < experts}
            assert own == set(order[: len(own)])


@pytest.mark.parametrize("model_type", [*sorted(CHOOSING), "gpt_oss", "qwen3_moe", "mixtral", "granitemoe"])
def test_a_raised_expert_gets_every_token(tmp_path, model_type):
    loaded = load_model(saved(model_type, tmp_path / "model"), device="cpu")
    anatomy = loaded.anatomy
    layer = next(at for at in range(anatomy.layers) if anatomy.router(at) is not None)
    path = anatomy.router(layer).path
    experts, raised = anatomy.parts(layer, "mlp")[0].experts, 2
    added = torch.zeros(experts)
    added[raised] = 1e3
    biased = anatomy.bias_place(layer, path) is not None
    edit = ModuleEdit(layer, path, (), bias=added) if biased else ModuleEdit(
        layer, path, (), left=added[:, None], right=chosen_and_read(loaded)[1][ROUTER_IN, layer].mean((0, 1))[:, None]
    )  # fmt: skip
    plan = make_plan([edit], {"fingerprint": loaded.fingerprint, "method": "test", "settings": {}})
    before, _ = chosen_and_read(loaded)
    plain = logits_of(loaded.model, anatomy)
    assert not all(raised in before[layer, token] for token in range(IDS.numel()))
    with applied(loaded, plan):
        after, _ = chosen_and_read(loaded)
        edited = logits_of(loaded.model, anatomy)
    if biased:
        assert all(raised in after[layer, token] for token in range(IDS.numel()))
    assert torch.equal(logits_of(loaded.model, anatomy), plain)
    export(loaded, plan, tmp_path / "edited")
    stock = load_model(tmp_path / "edited", device="cpu")
    assert torch.equal(logits_of(stock.model, stock.anatomy), edited)
    assert not torch.equal(edited, plain)


def test_modules_without_a_bias_get_none(tmp_path):
    loaded = load_model(saved("qwen3_moe", tmp_path), device="cpu")
    metadata = {"fingerprint": loaded.fingerprint, "method": "test", "settings": {}}
    for path, size in (("mlp.gate", 4), ("self_attn.q_proj", 64)):
        plan = make_plan([ModuleEdit(1, path, (), bias=torch.ones(size))], metadata)
        with pytest.raises(BrocaError, match=path), applied(loaded, plan):
            pass
        with pytest.raises(BrocaError, match=path):
            export(loaded, plan, tmp_path / "out")
