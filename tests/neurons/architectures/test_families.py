"""Rows of the table whose layers are tried on a tiny model of their type, against transformers' own forward."""

import json
from dataclasses import replace

import models
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from tiny_models import OVERRIDES, VOCABULARY, tiny_config, tiny_model

from cli.inspect import command as inspect
from editing.checkpoints.adapter import export_adapter
from editing.checkpoints.difference import compare
from editing.checkpoints.export import export
from editing.directions.direction import Direction
from editing.methods.added_values import adding, values_of
from editing.methods.keyed import keyed_blocks, keyed_plan, require_common_inputs
from editing.methods.scope import chosen_places
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from neurons.architectures.anatomy import BLOCKS, anatomy_of
from neurons.architectures.examination import examine
from neurons.architectures.layouts import LAYOUTS, WRAPPERS
from neurons.architectures.self_check import (
    adds_shared,
    checked,
    checked_on_small_model,
    self_check,
    writes_to_residual,
)
from neurons.architectures.sites import logits, site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model, open_model
from neurons.neuron_sets.identify import neurons_from, random_neurons, random_set
from neurons.neuron_sets.neuron_set import load_neuron_set, neuron_set
from neurons.recording.corpus_recording import model_metadata
from neurons.recording.record import record
from neurons.recording.text_pass import numbered, read_text
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import read_corpus

TYPES = sorted({*LAYOUTS, *WRAPPERS} - {name.partition("-")[0] for name in models.FAMILIES})
# Not found by structure: their experts, their activation or the name of their layers are unlike those of all others, or (of
# wrappers of Cohere 2) the config has a scale of the logits that the head does not apply.
UNLIKE = (
    "git",
    "llama4",
    "llama4_text",
    "gemma3n_text",
    "falcon_h1",
    "lfm2",
    "lfm2_moe",
    "aya_vision",
    "cohere2_vision",
)
IDS = torch.tensor([[5, 40, 63, 70, 41, 9, 80, 65, 30], [7, 66, 50, 51, 89, 90, 17, 61, 62]])


@pytest.fixture(scope="module")
def model_of():
    made = {}

    def of(model_type):
        if model_type not in made:
            made.clear()
            made[model_type] = tiny_model(tiny_config(model_type))
        return made[model_type]

    return of


def logits_of(model, anatomy, hooks=None):
    """With a hook at every layer's mlp_in, so that experts always run the same way."""
    idle = {("mlp_in", layer): lambda values, routed: None for layer in range(anatomy.layers)}
    with torch.no_grad(), site_hooks(anatomy, idle | (hooks or {})):
        return model(input_ids=IDS, use_cache=False).logits.float()


def silencer(anatomy, columns):
    def silence(values, routed):
        start = 0 if routed is None else routed.expert * anatomy.expert_width
        own = [column - start for column in columns if 0 <= column - start < values.shape[-1]]
        values = values.clone()
        values[..., own] = 0
        return values

    return silence


def assert_same_at_site_and_in_weight(model):
    """A few neurons of every part of every layer, and a head of every layer with heads."""
    anatomy = anatomy_of(model)
    plain = logits_of(model, anatomy)
    changed = tried = 0
    for layer in range(anatomy.layers):
        for block in BLOCKS:
            width = anatomy.component_width(block, layer)
            for part in anatomy.parts(layer, block):
                columns = [*range(part.first, part.first + width), part.columns.stop - 1]
                by_hook = logits_of(model, anatomy, {(f"{block}_in", layer): silencer(anatomy, columns)})
                kept = [anatomy.columns(layer, block, slice(c, c + 1)) for c in columns]
                before = [column.clone() for column in kept]
                for column in kept:
                    column.zero_()
                by_weight = logits_of(model, anatomy)
                for column, values in zip(kept, before, strict=True):
                    column.copy_(values)
                assert (by_hook - by_weight).abs().max() <= 1e-5 * plain.abs().max(), part.path
                changed += not torch.equal(by_hook, plain)
                tried += 1
    # An expert may get no token.
    assert tried and changed >= 0.7 * tried
    assert torch.equal(logits_of(model, anatomy), plain)


@pytest.mark.parametrize("model_type", TYPES)
def test_silencing_at_the_site_and_in_the_weight_is_the_same(model_of, model_type):
    assert_same_at_site_and_in_weight(model_of(model_type))


@pytest.mark.parametrize(
    ("model_type", "settings", "neurons"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 4, "mlp_layer_types": ["dense"] * 4}, "intermediate_size"),
        ("granitemoehybrid", {"num_local_experts": 0}, "shared_intermediate_size"),
    ],
)
def test_a_type_of_mixtures_may_have_only_dense_layers(model_type, settings, neurons):
    config = tiny_config(model_type, overrides={**OVERRIDES.get(model_type, {}), **settings})
    model = tiny_model(config)
    anatomy = anatomy_of(model)
    assert (anatomy.neurons, anatomy.experts) == (getattr(config, neurons), 1)
    assert_same_at_site_and_in_weight(model)


def test_a_type_of_mixtures_may_have_layers_without_neurons_only():
    model = tiny_model(tiny_config("nemotron_h", overrides={"layers_block_type": ["mamba", "attention"] * 2}))
    anatomy = anatomy_of(model)
    assert (anatomy.neurons, anatomy.experts, anatomy.layers_with("attn")) == (0, 1, (1, 3))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_row_passes_the_self_check_of_unknown_architectures(model_of, model_type):
    model = model_of(model_type)
    anatomy = anatomy_of(model)
    # As if it were examined, so that signs are checked where the row names no activation.
    signs = model_type != "minimax_m3_vl_text"  # whose linear branch is increased by 1
    self_check(model, replace(anatomy, layout=replace(anatomy.layout, examined=signs)), IDS)
    assert writes_to_residual(model, anatomy, IDS) == anatomy.residual_output


@pytest.mark.parametrize("model_type", sorted(set(TYPES) - set(UNLIKE)))
def test_the_row_is_what_the_structure_says(model_of, model_type):
    model = model_of(model_type)
    row, found = anatomy_of(model).layout, examine(model)
    for name in ("layers", "outputs", "gate", "up", "mixture", "transposed", "logit_scale", "logit_divisor"):
        assert getattr(found, name) == getattr(row, name), name
    for name in ("dense", "shared"):
        theirs, ours = getattr(found, name), getattr(row, name)
        parts = ("output", "gate", "up", "factor")
        assert theirs is None or [getattr(theirs, part) for part in parts] == [
            getattr(ours, part) for part in parts
        ]


@pytest.mark.parametrize("model_type", [name for name in TYPES if name in LAYOUTS and LAYOUTS[name].shared])
def test_a_shared_expert_adds_its_common_inputs_times_its_weight(model_of, model_type):
    model = model_of(model_type)
    anatomy = anatomy_of(model)
    assert anatomy.layout.shared.added and adds_shared(model, anatomy, IDS)
    if anatomy.layout.shared.factor is not None:
        without = replace(anatomy.layout, shared=replace(anatomy.layout.shared, factor=None))
        assert not adds_shared(model, replace(anatomy, layout=without), IDS)


def test_a_shared_expert_that_is_scaled_has_no_common_inputs():
    """Granite's multiplier scales what reaches the residual, and the examination does not know it."""
    config = tiny_config("granitemoeshared")
    config.residual_multiplier = 0.25
    model = tiny_model(config)
    anatomy = anatomy_of(model)
    found = checked(model, replace(anatomy, layout=examine(model)))
    assert not found.layout.shared.added
    assert found.common(1, "mlp") is None and found.common(1, "attn") is not None


MULTIPLIERS = {
    **{name: {"residual_multiplier": 0.25} for name in ("granite", "granitemoe", "granitemoeshared")},
    "falcon_h1": {"attention_out_multiplier": 0.5, "mlp_multipliers": [0.7, 0.25]},
}


@pytest.mark.parametrize("model_type", MULTIPLIERS)
def test_multipliers_after_the_modules_are_those_of_the_config(model_type):
    config = tiny_config(model_type)
    for name, value in MULTIPLIERS[model_type].items():
        setattr(config, name, value)
    model = tiny_model(config)
    anatomy = anatomy_of(model)
    assert anatomy.residual_output and anatomy.multiplier("mlp") == 0.25
    assert anatomy.multiplier("attn") == (0.5 if model_type == "falcon_h1" else 0.25)
    self_check(model, anatomy, IDS)
    assert writes_to_residual(model, anatomy, IDS)
    for block in BLOCKS:
        others = {**anatomy.layout.multipliers, block: 1.0}
        wrong = replace(anatomy, layout=replace(anatomy.layout, multipliers=others))
        with pytest.raises(BrocaError, match=f"layer 3, {block} .*residual stream"):
            self_check(model, wrong, IDS)


@pytest.mark.parametrize("model_type", ["doge", "zaya"])
def test_a_learned_factor_of_the_residual_is_seen_without_the_weights(model_type):
    """Doge's is on the sum with the attention's output, Zaya's on that with the MLP's."""
    config = tiny_config(model_type)
    layout = replace(examine(tiny_model(config)), residual=True)
    assert not checked_on_small_model(config, layout).residual


def test_mlp_out_is_all_that_the_experts_and_the_shared_one_add():
    config = tiny_config("granitemoeshared")
    config.residual_multiplier = 0.25
    model = tiny_model(config)
    anatomy, kept, layer = anatomy_of(model), {}, 2

    def keep(name):
        return lambda values, routed: kept.__setitem__(name, values.clone())

    def silence(values, routed):
        return torch.zeros_like(values)

    logits_of(model, anatomy, {("mlp_out", layer): keep("added"), ("block_out", layer): keep("with")})
    logits_of(model, anatomy, {("mlp_in", layer): silence, ("block_out", layer): keep("without")})
    torch.testing.assert_close(kept["added"], (kept["with"] - kept["without"]) / 0.25, rtol=1e-4, atol=1e-5)
    # What replaces the sum is what the layer adds, and a gradient is that of the sum.
    logits_of(model, anatomy, {("mlp_out", layer): silence, ("block_out", layer): keep("silenced")})
    torch.testing.assert_close(kept["silenced"], kept["without"], rtol=1e-4, atol=1e-5)
    summed = {}
    with site_hooks(
        anatomy, {("mlp_out", layer): lambda values, routed: summed.__setitem__("values", values)}
    ):
        out = model(input_ids=IDS, use_cache=False).logits.sum()
    (gradient,) = torch.autograd.grad(out, summed["values"])
    with site_hooks(
        anatomy, {("block_out", layer): lambda values, routed: summed.__setitem__("end", values)}
    ):
        out = model(input_ids=IDS, use_cache=False).logits.sum()
    (at_end,) = torch.autograd.grad(out, summed["end"])
    torch.testing.assert_close(gradient, 0.25 * at_end, rtol=1e-4, atol=1e-6)


def test_experts_beside_the_mlp_are_named(tmp_path):
    """Gemma 4's mixtures: the row has the MLP beside them only."""
    moe = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    models.build_wrapper(tmp_path, "gemma4_text", **OVERRIDES["gemma4_text"], **moe)
    shown = CliRunner().invoke(inspect, [str(tmp_path), "--json"])
    assert json.loads(shown.output)["layers_with_experts_that_are_not_edited"] == "0, 1, 2, 3"


def saved(model_type, directory, **settings):
    config = tiny_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    model = tiny_model(config)
    model.save_pretrained(directory)
    models.tiny_tokenizer().save_pretrained(directory)
    return directory


def test_a_type_without_a_model_class_of_its_own_has_that_of_another(tmp_path):
    config = json.loads((saved("internlm3", tmp_path / "right") / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert load_model(tmp_path / "right", device="cpu").anatomy.neurons == 96
    wrong = saved("internlm3", tmp_path / "wrong") / "config.json"
    wrong.write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(BrocaError, match=r"'internlm3'.*'Qwen2ForCausalLM' of 'qwen2'"):
        load_model(tmp_path / "wrong", device="cpu")


@pytest.mark.parametrize("model_type", ["glmga", "pp_chart2table"])
def test_a_wrapper_without_a_model_class_of_its_own(tmp_path, model_type):
    assert load_model(saved(model_type, tmp_path), device="cpu").anatomy.layers == 4


def test_a_layer_that_does_not_run_without_images_is_named(tmp_path):
    with pytest.raises(BrocaError, match="mllama: layers 3 do not run"):
        load_model(saved("mllama", tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("model_type", "shape"), [("xlnet", r"\[8, 2, 64\]"), ("qwen4_exp_text", r"\[2, 8, 256\]")]
)
def test_layers_whose_values_are_no_rows_of_the_residual_stream_are_refused(model_type, shape):
    """XLNet has the positions first, Qwen4 several streams."""
    model = tiny_model(tiny_config(model_type))
    with pytest.raises(BrocaError, match=rf"{model_type}, layer 0: .*{shape}"):
        checked(model, anatomy_of(model))


def test_logits_of_padded_output_embeddings_are_cut():
    model = tiny_model(tiny_config("inkling_text"))
    hidden = torch.randn(2, model.config.hidden_size)
    assert model.get_output_embeddings().weight.shape[0] == VOCABULARY + 6
    divided = model.config.logits_mup_width_multiplier
    assert divided != 1
    expected = model.lm_head(hidden / divided)[:, :VOCABULARY]
    torch.testing.assert_close(logits(model, hidden), expected)
    checked(model, anatomy_of(model))


def random_plan(source, blocks=BLOCKS):
    generator = torch.Generator().manual_seed(1)
    anatomy, edits = source.anatomy, []
    for layer in range(anatomy.layers):
        for block in blocks:
            width = anatomy.width(f"{block}_in", layer)
            if not width:
                continue
            left = torch.randn(anatomy.residual, 1, generator=generator)
            right = torch.randn(width, 1, generator=generator) / width
            components = tuple(range(width // anatomy.component_width(block, layer)))
            notes = {"change_norm": float(left.norm() * right.norm()), "weight_norm": 1.0}
            edits.append(ModuleEdit(layer, block, components, left=left, right=right, notes=notes))
    return make_plan(edits, {"fingerprint": source.fingerprint, "model": "m", "method": "m", "settings": {}})


@pytest.mark.parametrize(
    "model_type",
    ["qwen3_next", "deepseek_v3", "kimi_linear", "jamba", "llama4_text", "nemotron_h", "gemma4_text", "lfm2"],
)
def test_an_exported_plan_is_the_applied_one(tmp_path, model_type):
    """Edits of heads, of experts, of shared experts and of dense layers, from the names on disk."""
    loaded = load_model(saved(model_type, tmp_path / "model"), device="cpu")
    source = open_model(tmp_path / "model")
    assert source.anatomy.head_dims == loaded.anatomy.head_dims
    plan = random_plan(source)
    export(source, plan, tmp_path / "edited")
    edited = load_model(tmp_path / "edited", device="cpu")
    plain = logits_of(loaded.model, loaded.anatomy)
    with applied(loaded, plan):
        by_plan = logits_of(loaded.model, loaded.anatomy)
    assert (by_plan - plain).abs().max() > 1e-2
    assert torch.equal(logits_of(edited.model, edited.anatomy), by_plan)
    assert torch.equal(logits_of(loaded.model, loaded.anatomy), plain)


def batches():
    seen = torch.ones_like(IDS, dtype=torch.bool)
    counted = seen.clone()
    counted[:, 0] = False
    return {"xx": [TokenBatch(IDS, seen, counted, torch.arange(2))]}


def test_every_token_reaches_a_shared_expert_and_a_dense_layer(tmp_path):
    loaded = load_model(saved("deepseek_v3", tmp_path), device="cpu")
    anatomy = loaded.anatomy
    read = record(loaded, batches(), ["mlp_in:sum", "mlp_in:text_mean", "mlp_act:positive"])
    routed, sums = read.routed[..., 0], read.moments["mlp_in:sum"][..., 0]
    dense, mixed = 0, 3
    assert [anatomy.mixed_in(layer) for layer in (dense, mixed)] == [False, True]
    # 4 experts and a shared one of 32 neurons; the dense layer's 96 are three groups.
    assert (anatomy.experts, anatomy.expert_width) == (5, 32)
    assert routed[mixed, 4] == 16 and routed[mixed, :4].sum() == 2 * 16
    assert routed[dense].tolist() == [16, 16, 16, 0, 0]
    assert sums[dense, :96].all() and not sums[dense, 96:].any()
    kept = []
    down = loaded.model.model.layers[mixed].mlp.shared_experts.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    loaded.model(input_ids=IDS, use_cache=False)
    handle.remove()
    values = kept[0].view(2, 9, 32)[:, 1:].double()
    torch.testing.assert_close(sums[mixed, 128:], values.sum((0, 1)))
    means = read.moments["mlp_in:text_mean"][mixed, 128:, 0]
    torch.testing.assert_close(means, values.mean(1).sum(0))


def test_means_of_neurons_in_a_family_of_mixtures_without_a_mixture(tmp_path):
    kinds = ["mamba", "attention", "mlp", "mlp"]
    made = models.build_wrapper(tmp_path, "nemotron_h", layers_block_type=kinds)
    loaded = load_model(str(made), device="cpu")
    assert loaded.anatomy.mixed and loaded.anatomy.experts == 1
    read = record(loaded, batches(), ["mlp_in:text_mean", "mlp_in:sum", "mlp_in:worst_rank"])
    kept = []
    handle = loaded.anatomy.outputs["mlp"][2].register_forward_pre_hook(
        lambda _, inputs: kept.append(inputs[0])
    )
    loaded.model(input_ids=IDS, use_cache=False)
    handle.remove()
    values = kept[0].view(2, 9, 96)[:, 1:].double()
    torch.testing.assert_close(read.moments["mlp_in:sum"][2, :, 0], values.sum((0, 1)))
    torch.testing.assert_close(read.moments["mlp_in:text_mean"][2, :, 0], values.mean(1).sum(0))
    read.metadata.update(model_metadata(loaded))
    assert {*neurons_from(read, "plnd", 0.5).of("xx")[:, 0].tolist()} == {2, 3}


def test_heads_of_a_hybrid_are_those_of_its_softmax_attention(tmp_path):
    loaded = load_model(saved("qwen3_5_text", tmp_path / "model"), device="cpu")
    anatomy = loaded.anatomy
    read = record(loaded, batches(), ["attn_in:attribution", "attn_in:absolute"])
    read.metadata.update(model_metadata(loaded))
    lacking = [layer for layer in range(4) if not anatomy.has(layer, "attn")]
    assert read.metadata["without_heads"] == {"linear attention": lacking}
    heads = neurons_from(read, "head-gradient", 1.0)
    assert {*heads.of("xx")[:, 0].tolist()} == {*range(4)} - {*lacking}
    assert len(heads.of("xx")) == sum(heads.counts)
    for statistics in (None, read):
        one = neurons_from(read, "head-gradient", 1 / sum(heads.counts))
        (drawn,) = random_set(one, 0, statistics).of("xx").tolist()
        assert drawn[0] == int(one.of("xx")[0, 0]) and drawn != one.of("xx")[0].tolist()


def test_a_control_has_only_neurons_that_exist(tmp_path):
    """The dense layer has 96 neurons, the layers of experts 160."""
    loaded = load_model(saved("deepseek_v3", tmp_path / "model"), device="cpu")
    read = record(loaded, batches(), ["mlp_in:absolute"])
    read.metadata.update(model_metadata(loaded))
    members = {"xx": torch.stack([torch.zeros(40, dtype=torch.int64), torch.arange(40)], dim=1)}
    metadata = {"neuron_counts": read.metadata["neuron_counts"]}
    neuron_set(members, {"xx": torch.zeros(40)}, 4, 160, metadata).save(tmp_path / "set.safetensors")
    like = load_neuron_set(tmp_path / "set.safetensors")
    assert like.counts == [96, 160, 160, 160]
    for drawn in (random_set(like), random_set(like, 0, read)):
        assert len(drawn.of("xx")) == 40 and drawn.of("xx")[:, 1].max() < 96
        assert drawn.counts == like.counts
    free = random_neurons(loaded, ("xx",), 0.9)
    assert (free.of("xx")[:, 1] < torch.tensor(free.counts)[free.of("xx")[:, 0]]).all()


def test_layers_without_heads_are_named_and_the_others_edited(tmp_path):
    source = open_model(saved("qwen3_5_text", tmp_path / "model"))
    anatomy = source.anatomy
    lacking = [layer for layer in range(4) if not anatomy.has(layer, "attn")]
    assert lacking and anatomy.layers_with("mlp") == (0, 1, 2, 3)
    require_common_inputs(anatomy, ("attn", "mlp"), range(4))
    places = chosen_places(source, range(4), BLOCKS)
    assert [layer for layer, module in places if module == "mlp"] == [0, 1, 2, 3]
    assert not {(layer, "attn") for layer in lacking} & set(places)
    shown = CliRunner().invoke(inspect, [str(tmp_path / "model"), "--json"])
    assert f"{', '.join(map(str, lacking))} (linear attention)" in shown.output
    with pytest.raises(UsageError, match="linear attention"):
        chosen_places(source, lacking, ("attn",))
    with pytest.raises(UsageError, match=rf"layers? {', '.join(map(str, lacking))}.*linear attention.*heads"):
        require_common_inputs(anatomy, ("attn",), range(4))
    plan = random_plan(source)
    assert {edit.layer for edit in plan.edits if edit.block == "attn"} == set(range(4)) - set(lacking)
    export(source, plan, tmp_path / "edited")
    found = compare(source, tmp_path / "edited")
    assert [(edit.layer, edit.block) for edit in found.edits] == [(e.layer, e.block) for e in plan.edits]
    export_adapter(source, plan, tmp_path / "adapter")
    wrong = replace(plan.edits[0], layer=lacking[0], block="attn")
    with pytest.raises(BrocaError, match=f"layer {lacking[0]} has linear attention"):
        export(source, make_plan([wrong], plan.metadata), tmp_path / "wrong")


def test_keys_exist_in_the_dense_layers_of_a_mixture(tmp_path):
    source = open_model(saved("lfm2_moe", tmp_path))
    require_common_inputs(source.anatomy, ("mlp",))
    require_common_inputs(source.anatomy, ("mlp",), [0])
    with pytest.raises(UsageError, match=r"layers 1.*--blocks attn"):
        require_common_inputs(source.anatomy, ("mlp",), [0, 1])
    assert keyed_blocks(source.anatomy, ("mlp",)) == ("mlp",)
    experts = open_model(saved("mixtral", tmp_path / "experts")).anatomy
    assert keyed_blocks(experts, ("mlp",)) == keyed_blocks(experts, BLOCKS) == ("attn",)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "qwen2_moe", "granitemoeshared", "granite", "falcon_h1"]
)
def test_a_keyed_edit_adds_its_value_on_the_source(tmp_path, model_type, learned):
    """The mean change of the residual stream, before and after the gate of Qwen's shared expert, and multipliers."""
    settings = MULTIPLIERS.get(model_type, {})
    loaded = load_model(saved(model_type, tmp_path / "model", vocab_size=300, **settings), device="cpu")
    anatomy, layer = loaded.anatomy, 2
    corpus = read_corpus(models.write_corpus(tmp_path / "corpus"), None, "estimate")
    batches = language_batches(loaded, corpus)
    values = torch.randn(anatomy.layers, anatomy.residual, dtype=torch.float64)
    direction = Direction("qaa", "qab", {"block_out": values}, {}, {"fingerprint": loaded.fingerprint})
    plan = keyed_plan(loaded, corpus, direction, [layer], strength=0.5)
    (edit,) = plan.edits
    shared = anatomy.common(layer, "mlp")
    assert shared.experts is None and not edit.right[: shared.first].any() and edit.right.any()
    assert edit.components == tuple(range(shared.columns.start, shared.columns.stop))

    def means():
        kept = {}

        def keep(language):
            rows = kept.setdefault(language, [])
            return lambda values, routed, at: rows.append(at.rows(values).double())

        for language, of_language in batches.items():
            read_text(loaded, numbered({language: of_language}), {("block_out", layer): keep(language)})
        return {language: torch.cat(rows).mean(0) for language, rows in kept.items()}

    plain = means()
    if learned:
        with adding(loaded, plan, values_of(plan)):
            edited = means()
    else:
        with applied(loaded, plan):
            edited = means()
    torch.testing.assert_close(edited["qaa"] - plain["qaa"], 0.5 * values[layer], rtol=1e-3, atol=1e-3)
    for language in ("qab", "qac"):
        assert (edited[language] - plain[language]).abs().max() < 1e-3


def test_the_adapter_of_a_shared_expert_is_what_peft_reads(tmp_path):
    """PEFT takes ``down_proj`` for the experts of older files, also in dense layers, but not Granite's name."""
    loaded = load_model(saved("granitemoeshared", tmp_path / "model"), device="cpu")
    plan = random_plan(loaded, ("mlp",))
    first = loaded.anatomy.common(0, "mlp").first
    kept = [
        replace(edit, right=edit.right * (torch.arange(len(edit.right)) >= first)[:, None])
        for edit in plan.edits
    ]
    common = make_plan(kept, plan.metadata)
    with pytest.raises(BrocaError, match=r"layer 0, mlp: the experts .* shared expert"):
        export_adapter(loaded, plan, tmp_path / "wrong")
    export_adapter(loaded, common, tmp_path / "adapter")
    with applied(loaded, common):
        edited = logits_of(loaded.model, loaded.anatomy)
    adapted = peft.PeftModel.from_pretrained(loaded.model, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(adapted, loaded.anatomy), edited, rtol=1e-4, atol=1e-4)
    source = open_model(saved("deepseek_v3", tmp_path / "deepseek"))
    plan = random_plan(source, ("mlp",))
    dense = make_plan([edit for edit in plan.edits if edit.layer == 0], plan.metadata)
    with pytest.raises(BrocaError, match=r"PEFT.*mlp\.down_proj"):
        export_adapter(source, dense, tmp_path / "misread")


def test_layers_have_their_own_widths(tmp_path):
    """Gemma 4's layers that share keys have wider MLPs, and its full attention wider heads."""
    config = tiny_config("gemma4_text")
    assert isinstance(config, transformers.PreTrainedConfig)
    loaded = load_model(saved("gemma4_text", tmp_path), device="cpu")
    anatomy = loaded.anatomy
    seen = {}

    def keep(site, layer):
        return lambda values, routed: seen.__setitem__((site, layer), values.clone())

    sites = [(site, layer) for site in ("mlp_in", "attn_in") for layer in range(anatomy.layers)]
    logits_of(loaded.model, anatomy, {place: keep(*place) for place in sites})
    for layer, block in enumerate(loaded.model.model.layers):
        for site, module in (("mlp_in", block.mlp.down_proj), ("attn_in", block.self_attn.o_proj)):
            own = anatomy.width(site, layer)
            assert own == module.in_features
            values = seen[site, layer]
            assert values.shape[-1] == anatomy.width(site)
            assert values[..., :own].any() and not values[..., own:].any()
