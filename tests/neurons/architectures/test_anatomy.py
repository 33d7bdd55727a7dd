"""Every known architecture: what a hook silences is what its checkpoint column silences."""

import json

import models
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from editing.checkpoints.export import export
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, SIGN_PRESERVING, anatomy_of
from neurons.architectures.layouts import LAYOUTS
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError
from neurons.models.source import load_model, open_model

CASES = [
    pytest.param(family, tied, dtype, id=f"{family}-{'tied' if tied else 'untied'}-{dtype}")
    for family in models.FAMILIES
    for tied, dtype in ((False, "float32"), (True, "bfloat16"))
]
FLOAT32 = [case for case in CASES if case.values[2] == "float32"]
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
IDS = torch.tensor([[0, 40, 263, 270, 41, 99, 280, 265, 30], [0, 266, 50, 51, 289, 290, 7, 261, 262]])


@pytest.fixture(scope="module")
def loaded_case(checkpoint_of):
    """A checkpoint loaded in its own dtype; a test that changes a weight puts it back."""
    cases = {}

    def load(model_type, tied=False, dtype="float32"):
        key = (model_type, tied, dtype)
        if key not in cases:
            cases[key] = load_model(str(checkpoint_of(*key)), device="cpu", dtype=dtype)
        return cases[key]

    return load


def logits_of(loaded, readers=None):
    """With a reader at every layer's mlp_in, so that experts always run the same way."""
    anatomy = loaded.anatomy
    idle = {("mlp_in", layer): lambda values, routed: None for layer in range(anatomy.layers)}
    with torch.no_grad(), site_hooks(anatomy, idle | (readers or {})):
        return loaded.model(IDS, use_cache=False).logits.float()


def silencer(anatomy, columns):
    """A reader that zeroes columns of the flat width."""

    def silence(values, routed):
        start = 0 if routed is None else routed.expert * anatomy.expert_width
        values = values.clone()
        for column in columns:
            if start <= column < start + values.shape[-1]:
                values[..., column - start] = 0
        return values

    return silence


def flat(anatomy, weight):
    """[d, n] of what ``output_weight`` gave."""
    return weight if weight.ndim == 2 else torch.cat(list(weight), dim=1)


def test_the_table_is_tested():
    """The rows of families that are not here are tried in test_families.py."""
    assert {name.partition("-")[0] for name in models.FAMILIES} <= set(LAYOUTS)


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_a_silent_neuron_or_head_is_its_columns_zeroed(loaded_case, family, tied, dtype):
    loaded = loaded_case(family, tied, dtype)
    anatomy = loaded.anatomy
    plain = logits_of(loaded)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    wanted = [("mlp", 0, [0]), ("mlp", 1, [25]), ("mlp", 2, [anatomy.neurons - 1]), ("mlp", 2, [25, 70])]
    wanted += [
        ("attn", layer, list(range(head * anatomy.head_dim, (head + 1) * anatomy.head_dim)))
        for layer in range(anatomy.layers)
        for head in range(anatomy.heads)
    ]
    differing = 0
    for block, layer, columns in wanted:
        columns = [column for column in columns if column < anatomy.width(f"{block}_in")]
        by_hook = logits_of(loaded, {(f"{block}_in", layer): silencer(anatomy, columns)})
        kept = []
        for column in columns:
            own = anatomy.columns(layer, block, slice(column, column + 1))
            kept.append((own, own.clone()))
            own.zero_()
            if block == "mlp":
                assert anatomy.value(layer, column).shape == (anatomy.residual,)
                assert not anatomy.value(layer, column).any()
        by_column = logits_of(loaded)
        for own, values in kept:
            own.copy_(values)
        torch.testing.assert_close(by_hook, by_column, rtol=0, atol=0)
        differing += not torch.equal(by_hook, plain)
    # A neuron of OPT's may be silent by itself (ReLU), an expert may get no token.
    assert differing >= len(wanted) - 2
    assert torch.equal(logits_of(loaded), plain)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(before[name], tensor)


def query_rows(family, loaded, head):
    """Rows of the first layer's (fused) query weight that make one head's queries, as a view."""
    anatomy, block = loaded.anatomy, loaded.anatomy.blocks[0]
    width = anatomy.head_dim
    own = slice(head * width, (head + 1) * width)
    if family == "gpt2":
        return block.attn.c_attn.weight.data[:, own]
    if family == "phi3":
        return block.self_attn.qkv_proj.weight.data[own]
    if family == "gpt_neox":
        return block.attention.query_key_value.weight.data[head * 3 * width :][:width]
    if family == "bloom":
        return block.self_attention.query_key_value.weight.data[head * 3 * width :][:width]
    if family.startswith("falcon"):
        return block.self_attention.query_key_value.weight.data[own]
    attention = block.attn if family == "gptj" else block.self_attn
    return attention.q_proj.weight.data[own]


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_head_columns_are_that_heads_output(loaded_case, family, tied, dtype):
    """A head whose query is turned round changes its own columns of attn_in and no other's."""
    loaded = loaded_case(family, tied, dtype)
    anatomy = loaded.anatomy
    width = anatomy.head_dim
    values = {}

    def run(name):
        readers = {("attn_in", 0): lambda v, routed: values.__setitem__(name, v.detach().clone())}
        logits_of(loaded, readers)

    run("before")
    query = query_rows(family, loaded, 1)
    kept = query.clone()
    query *= -1
    run("after")
    query.copy_(kept)
    changed = (values["before"] != values["after"]).any(0).any(0)
    assert len(changed) == 2 * width == anatomy.width("attn_in")
    assert not changed[:width].any()
    assert changed[width:].all()


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_pieces_on_disk_are_the_weights_in_memory(loaded_case, family, tied, dtype):
    loaded = loaded_case(family, tied, dtype)
    anatomy = loaded.anatomy
    weights = Weights(loaded)
    with safe_open(str(loaded.checkpoint / "model.safetensors"), framework="pt") as stored:
        names = set(stored.keys())
        for block in BLOCKS:
            for layer in range(anatomy.layers):
                pieces = anatomy.stored(layer, block, names)
                whole = torch.full((anatomy.residual, anatomy.width(f"{block}_in")), torch.nan)
                for piece in pieces:
                    tensor = stored.get_tensor(piece.tensor)
                    assert tensor.dtype == getattr(torch, dtype)
                    tensor = tensor if piece.index is None else tensor[piece.index]
                    whole[:, piece.columns] = (tensor.T if piece.transposed else tensor).float()
                live = flat(anatomy, anatomy.parts(layer, block)[0].weight)
                assert torch.equal(whole, live.float())
                assert torch.equal(weights.read(layer, block), live.double())
        assert len(pieces) == (3 if family in MIXTURES else 1)


@pytest.mark.parametrize(("family", "tied", "dtype"), FLOAT32)
def test_the_numbers_are_the_models(loaded_case, checkpoint_of, family, tied, dtype):
    anatomy = loaded_case(family).anatomy
    width = {"bloom": 256, "qwen3_moe": 40}.get(family, 48)
    experts = 3 if family in MIXTURES else 1
    assert anatomy.model_type == family.partition("-")[0]
    assert (anatomy.layers, anatomy.residual, anatomy.heads) == (3, 64, 2)
    assert (anatomy.experts, anatomy.expert_width, anatomy.neurons) == (experts, width, experts * width)
    assert anatomy.head_dim == {"mistral": 48, "qwen3": 48, "qwen3_moe": 48, "gpt_oss": 48}.get(family, 32)
    ungated = ("phi", "gpt2", "opt", "opt-post_norm", "bloom", "gpt_neox", "gptj", "falcon", "falcon-new")
    assert anatomy.gated == (family not in ungated)
    post_norm = ("gemma2", "gemma3_text", "gemma3", "olmo2", "opt-post_norm")
    assert anatomy.residual_output == (family not in post_norm)
    assert (anatomy.component_width("mlp", 0), anatomy.component_width("attn", 0)) == (1, anatomy.head_dim)
    looked_at = open_model(str(checkpoint_of(family))).anatomy
    assert looked_at.layout == anatomy.layout
    assert (looked_at.neurons, looked_at.experts, looked_at.heads) == (
        anatomy.neurons,
        anatomy.experts,
        anatomy.heads,
    )


def silencing_plan(loaded):
    """Two neurons of layers 0 and 2 (in two experts of a mixture) and head 1 of layer 1 to zero."""
    anatomy = loaded.anatomy
    neurons = torch.ones(anatomy.neurons)
    chosen = [3, anatomy.neurons - 2]
    neurons[chosen] = 0
    head = torch.ones(anatomy.width("attn_in"))
    columns = range(anatomy.head_dim, 2 * anatomy.head_dim)
    head[list(columns)] = 0
    notes = {"change_norm": 1.0, "weight_norm": 2.0}
    edits = [
        ModuleEdit(0, "mlp", tuple(chosen), column_scale=neurons, notes=notes),
        ModuleEdit(1, "attn", (1,), column_scale=head, notes=notes),
        ModuleEdit(2, "mlp", tuple(chosen), column_scale=neurons.clone(), notes=notes),
    ]
    metadata = {
        "method": "test",
        "settings": {},
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        "languages": ["qaa"],
    }
    silence = silencer(anatomy, chosen)
    readers = {
        ("mlp_in", 0): silence,
        ("attn_in", 1): silencer(anatomy, columns),
        ("mlp_in", 2): silence,
    }
    return make_plan(edits, metadata), readers


@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_an_exported_or_live_edit_is_what_its_hook_silences(tmp_path, loaded_case, family, tied, dtype):
    loaded = loaded_case(family, tied, dtype)
    plan, readers = silencing_plan(loaded)
    plain = logits_of(loaded)
    by_hook = logits_of(loaded, readers)
    assert not torch.equal(plain, by_hook)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with applied(loaded, plan):
        assert torch.equal(logits_of(loaded), by_hook)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(before[name], tensor)
    done = export(loaded, plan, tmp_path / "steered")
    again = load_model(str(tmp_path / "steered"), device="cpu", dtype=dtype)
    assert torch.equal(logits_of(again), by_hook)
    # Of the experts with a tensor of their own, the one in the middle is not touched.
    per_expert = family in ("mixtral", "qwen3_moe")
    assert len(done.tensors) == (5 if per_expert else 3)
    sizes = load_file(loaded.checkpoint / "model.safetensors"), load_file(done.path / "model.safetensors")
    differing = {name for name, tensor in sizes[0].items() if not torch.equal(tensor, sizes[1][name])}
    assert differing == set(done.tensors)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe", "gpt_oss", "phi3"])
def test_a_dense_edit_is_the_formula_in_every_layout(tmp_path, loaded_case, family, monkeypatch):
    """diag(r) W diag(c) + U K^T, written in blocks far smaller than a tensor."""
    import editing.checkpoints.export as module

    loaded = loaded_case(family)
    anatomy = loaded.anatomy
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    d, edits, wanted = anatomy.residual, [], {}
    for layer, block in ((0, "mlp"), (1, "attn"), (2, "mlp")):
        n = anatomy.width(f"{block}_in")
        r, c, U, K = 1 + 0.1 * random(d), 1 + 0.1 * random(n), random(d, 2), 0.1 * random(n, 2)
        notes = {"change_norm": 1.0, "weight_norm": 2.0}
        edits.append(ModuleEdit(layer, block, (0,), r, c, U, K, notes=notes))
        W = flat(anatomy, anatomy.parts(layer, block)[0].weight).double()
        wanted[layer, block] = r.double()[:, None] * W * c.double() + U.double() @ K.double().T
    plan = make_plan(edits, silencing_plan(loaded)[0].metadata)
    write = module.write_checkpoint
    monkeypatch.setattr(
        module, "write_checkpoint", lambda *given, **named: write(*given, **named, chunk_bytes=700)
    )
    export(loaded, plan, tmp_path / "steered")
    again = load_model(str(tmp_path / "steered"), device="cpu")
    for (layer, block), W in wanted.items():
        found = flat(anatomy, again.anatomy.parts(layer, block)[0].weight).double()
        torch.testing.assert_close(found, W, rtol=1e-6, atol=1e-6)
    with applied(loaded, plan):
        for (layer, block), W in wanted.items():
            found = flat(anatomy, anatomy.parts(layer, block)[0].weight).double()
            torch.testing.assert_close(found, W, rtol=1e-6, atol=1e-6)


def renamed(checkpoint, target, rename):
    """The checkpoint with other names for its tensors; None leaves one out."""
    stored = load_file(checkpoint / "model.safetensors")
    names = {name: rename(name) for name in stored}
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    kept = {new: stored[old] for old, new in names.items() if new is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("family", "now", "then"),
    [
        ("gpt2", "transformer.", ""),
        ("bloom", "transformer.", ""),
        ("gemma3", "language_model.model.", "model.language_model."),
        ("qwen3_moe", "", ""),
    ],
)
def test_older_names_lead_to_the_same_weights(tmp_path, checkpoint_of, loaded_case, family, now, then):
    loaded = loaded_case(family, True, "bfloat16") if family != "qwen3_moe" else loaded_case(family)
    source = loaded.checkpoint
    if family == "qwen3_moe":
        # Files that keep the experts fused, as they are in memory.
        target = renamed(source, tmp_path / "old", lambda name: None if ".experts." in name else name)
        stored = load_file(target / "model.safetensors")
        for name, tensor in loaded.model.state_dict().items():
            if ".experts." in name:
                stored[name] = tensor.contiguous()
        save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    else:
        changed = []

        def rename(name):
            changed.append(name.startswith(now))
            return then + name.removeprefix(now) if name.startswith(now) else name

        target = renamed(source, tmp_path / "old", rename)
        assert any(changed)
    dtype = "float32" if family == "qwen3_moe" else "bfloat16"
    old = load_model(str(target), device="cpu", dtype=dtype)
    assert torch.equal(logits_of(old), logits_of(loaded))
    for block in BLOCKS:
        live = flat(old.anatomy, old.anatomy.parts(1, block)[0].weight)
        assert torch.equal(Weights(old).read(1, block), live.double())
    plan, readers = silencing_plan(old)
    export(old, plan, tmp_path / "steered")
    again = load_model(str(tmp_path / "steered"), device="cpu", dtype=dtype)
    assert torch.equal(logits_of(again), logits_of(old, readers))


def test_a_missing_tensor_is_named(checkpoint_of):
    anatomy = open_model(str(checkpoint_of("mixtral"))).anatomy
    names = set(load_file(checkpoint_of("mixtral") / "model.safetensors"))
    missing = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    with pytest.raises(BrocaError, match=missing.replace(".", r"\.")):
        anatomy.stored(2, "mlp", names - {missing})
    with pytest.raises(BrocaError, match=r"no tensor 'model\.layers\.1\.self_attn\.o_proj\.weight'"):
        anatomy.stored(1, "attn", names - {"model.layers.1.self_attn.o_proj.weight"})


def test_a_weight_that_is_there_twice_is_refused(checkpoint_of):
    anatomy = open_model(str(checkpoint_of("gpt2"))).anatomy
    names = set(load_file(checkpoint_of("gpt2") / "model.safetensors"))
    with pytest.raises(BrocaError, match=r"twice.*transformer\.h\.0\..*'h\.0\."):
        anatomy.stored(0, "mlp", names | {"h.0.mlp.c_proj.weight"})


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path, checkpoint_of):
    source = open_model(str(checkpoint_of("gpt_oss")))
    target = renamed(source.checkpoint, tmp_path / "cut", lambda name: name)
    stored = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    stored[name] = stored[name][:2].contiguous()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrocaError, match=r"experts\.down_proj has shape \[2, 48, 64\].*\[3, 48, 64\]"):
        Weights(open_model(str(target))).read(0, "mlp")


@pytest.mark.parametrize("name", SIGN_PRESERVING)
def test_sign_preserving_activations_are(name):
    values = torch.cat([torch.linspace(-9, 9, 20001), torch.tensor([1e-6, -1e-6, 0.0])])
    assert torch.equal(ACT2FN[name](values) > 0, values > 0)


@pytest.mark.parametrize(
    ("family", "attribute"),
    [
        ("llama", "hidden_act"),
        ("gemma2", "hidden_activation"),
        ("gpt2", "activation_function"),
        ("falcon", "activation"),
    ],
)
def test_an_activation_whose_sign_says_nothing_is_refused_by_name(tmp_path, family, attribute):
    models.build_checkpoint(tmp_path, family, **{attribute: "sigmoid"})
    for look in (open_model, lambda path: load_model(path, device="cpu")):
        with pytest.raises(BrocaError, match=f"'sigmoid' of {family}"):
            look(str(tmp_path))


def test_a_dense_layer_among_mixtures_has_neurons_that_every_token_reaches(tmp_path):
    models.build_checkpoint(tmp_path, "qwen3_moe", mlp_only_layers=[1], intermediate_size=100)
    loaded = load_model(str(tmp_path), device="cpu")
    anatomy = loaded.anatomy
    assert [anatomy.mixed_in(layer) for layer in range(3)] == [True, False, True]
    # Three experts of 40; the dense layer's 100 neurons fill two groups and a half.
    assert [anatomy.width("mlp_in", layer) for layer in range(3)] == [120, 100, 120]
    seen = []
    hooks = {
        ("mlp_in", 1): lambda values, routed: seen.append((routed.expert, values.clone(), routed.tokens))
    }
    logits_of(loaded, hooks)
    assert [expert for expert, *_ in seen] == [0, 1, 2]
    tokens = torch.arange(IDS.numel())
    assert all(values.shape[-1] == 40 and torch.equal(reached, tokens) for _, values, reached in seen)
    assert seen[1][1].any() and not seen[2][1][:, 20:].any()


def test_a_weight_of_an_unexpected_shape_is_named():
    model = models.tiny_model()
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(47, 64, bias=False)
    with pytest.raises(BrocaError, match=r"layer 1, mlp\.down_proj.*\(64, 47\).*\(64, 48\)"):
        anatomy_of(model)
    model = models.tiny_model()
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(60, 64, bias=False)
    with pytest.raises(BrocaError, match=r"layer 0, self_attn\.o_proj.*\(64, 60\).*\(64, 64\)"):
        anatomy_of(model)


def test_a_missing_module_is_named():
    model = models.tiny_model()
    del model.model.layers[2].mlp.gate_proj
    with pytest.raises(BrocaError, match=r"layer 2.*mlp\.gate_proj"):
        anatomy_of(model)


def test_a_model_without_a_causal_head_is_refused(tmp_path, checkpoint_of):
    target = renamed(checkpoint_of(), tmp_path / "t5", lambda name: name)
    (target / "config.json").write_text(json.dumps(transformers.T5Config().to_dict()))
    for look in (open_model, lambda path: load_model(path, device="cpu")):
        with pytest.raises(BrocaError, match="'t5'"):
            look(str(target))


def test_a_model_that_bypasses_its_modules_is_refused(tmp_path):
    models.build_checkpoint(tmp_path / "bloom", "bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(BrocaError, match="slow_but_exact"):
        load_model(str(tmp_path / "bloom"))
