"""SAE directions: encoding, files and features against loops over numbers and tokens, and planted features."""

import json
from dataclasses import replace

import models
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from editing.directions.autoencoder import Autoencoder, Firing
from editing.directions.estimation import _by_given, direction_of
from editing.directions.method import Given
from editing.directions.sae import language_features
from editing.directions.sae_files import read_autoencoder, write_autoencoder
from editing.directions.sae_recording import firing, random_batches
from editing.directions.texts import Texts
from neurons.errors import BrocaError, UsageError
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

D, F = 64, 24


def weights(seed=0, d=D, features=F):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d, features), "b_enc": (features,), "W_dec": (features, d), "b_dec": (d,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "threshold": torch.rand(features, generator=generator)}


def autoencoder(seed=0, layer=1, site="block_out", **kind):
    made = weights(seed)
    threshold = made.pop("threshold") if kind.pop("jump", False) else None
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    return Autoencoder(*(made[name] for name in names), layer, site, threshold, **kind)


def naive_encode(one, values):
    """Features of one token, number by number."""
    found = []
    length = sum(x * x for x in values) ** 0.5 if one.unit else 1.0
    values = [x / length for x in values]
    for f in range(one.features):
        z = float(one.encoder_bias[f])
        for i, x in enumerate(values):
            z += (x - (float(one.decoder_bias[i]) if one.centred else 0.0)) * float(one.encoder[i, f])
        jump = 0.0 if one.threshold is None else max(0.0, float(one.threshold[f]))
        found.append(z if z > jump else 0.0)
    if one.largest is not None:
        kept = sorted(range(len(found)), key=lambda f: -found[f])[: one.largest]
        found = [x if f in kept else 0.0 for f, x in enumerate(found)]
    return [x * length for x in found]


KINDS = {
    "standard": {}, "centred": {"centred": True}, "jumprelu": {"jump": True}, "topk": {"largest": 3},
    "unit": {"unit": True, "jump": True, "centred": True}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_encoding_equals_the_formula(kind):
    one = autoencoder(**kind)
    values = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(9))
    found = one.encode(values)
    for row in range(2):
        for token in range(3):
            expected = torch.tensor(naive_encode(one, values[row, token].tolist()))
            torch.testing.assert_close(found[row, token], expected, rtol=1e-4, atol=1e-4)
    assert 0 < int((found > 0).sum()) < found.numel()


def test_features_are_those_of_the_target_less_those_of_random_tokens():
    decoder = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 1.0], [5.0, 5.0]])
    none = torch.zeros(4).double()
    target = Firing(10, torch.tensor([9, 6, 5, 10]), torch.tensor([2.0, 3.0, 7.0, 1.0]).double(), none)
    random = Firing(4, torch.tensor([0, 2, 0, 3]), none, none)
    found = language_features(target, random, decoder)
    # 2 fires on half of the texts, which is not most; 3 on most random sequences too.
    assert found.features.tolist() == [0, 1]
    assert found.vector.tolist() == [2.0, 3.0]
    assert language_features(target, random, decoder, target_rate=0.4).features.tolist() == [0, 1, 2]
    assert language_features(target, random, decoder, random_rate=0.2).features.tolist() == [0]
    with pytest.raises(BrocaError, match=r"none of the autoencoder's 4 features"):
        language_features(target, random, decoder, target_rate=0.9, random_rate=0.7)
    with pytest.raises(UsageError, match="random rate"):
        language_features(target, random, decoder, target_rate=1.5)


def write_sae_lens(directory, config, seed=0, **changed):
    directory.mkdir(exist_ok=True)
    tensors = {k: v for k, v in {**weights(seed), **changed}.items() if v is not None}
    save_file(tensors, directory / "sae_weights.safetensors")
    (directory / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


HOOK = "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hook_name": HOOK}, (2, "block_out", True, False, None)),
        ({"hook_name": HOOK, "apply_b_dec_to_input": False}, (2, "block_out", False, False, None)),
        ({"architecture": "jumprelu", "metadata": {"hook_name": HOOK}}, (2, "block_out", True, True, None)),
        ({"hook_name": "blocks.1.hook_mlp_out", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
         (1, "mlp_out", True, False, 4)),
        ({"architecture": "topk", "k": 5, "hook_name": "blocks.0.hook_attn_out"}, (0, "attn_out", True, False, 5)),
        ({"hook_name": "blocks.2.hook_resid_pre", "normalize_activations": "none"},
         (1, "block_out", True, False, None)),
        ({"hook_name": "model.layers.2"}, (2, "block_out", True, False, None)),
    ],
)  # fmt: skip
def test_reads_sae_lens(tmp_path, config, expected):
    found = read_autoencoder(write_sae_lens(tmp_path / "sae", config))
    made = weights()
    for name, tensor in zip(
        ("W_enc", "b_enc", "W_dec", "b_dec"),
        (found.encoder, found.encoder_bias, found.decoder, found.decoder_bias),
        strict=True,
    ):
        assert torch.equal(tensor, made[name])
    has_threshold = found.threshold is not None
    assert (found.layer, found.site, found.centred, has_threshold, found.largest) == expected
    if has_threshold:
        assert torch.equal(found.threshold, made["threshold"])
    assert read_autoencoder(tmp_path / "sae" / "sae_weights.safetensors", expected[0]).layer == expected[0]


@pytest.mark.parametrize(
    ("config", "changed", "layer", "error", "match"),
    [
        ({}, {}, None, UsageError, "--sae-layer"),
        ({"hook_name": HOOK}, {}, 1, UsageError, "reads layer 2"),
        ({"hook_name": "blocks.1.attn.hook_z"}, {}, None, BrocaError, "hook_z"),
        ({"hook_name": HOOK, "architecture": "gated"}, {}, None, BrocaError, "gated"),
        ({"hook_name": HOOK, "activation_fn_str": "tanh-relu"}, {}, None, BrocaError, "tanh-relu"),
        ({"hook_name": HOOK, "normalize_activations": "layer_norm"}, {}, None, BrocaError, "layer_norm"),
        ({"hook_name": HOOK, "architecture": "topk"}, {}, None, BrocaError, "k is None"),
        ({"hook_name": HOOK}, {"b_enc": None}, None, BrocaError, "b_enc"),
        ({"hook_name": HOOK}, {"b_enc": torch.zeros(3)}, None, BrocaError, "inconsistent shapes"),
        ({"hook_name": HOOK}, {"b_dec": torch.full((D,), torch.nan)}, None, BrocaError, "not finite"),
        ({"hook_name": HOOK, "architecture": "jumprelu"}, {"threshold": None}, None, BrocaError, "threshold"),
    ],
)
def test_refuses_what_it_does_not_compute(tmp_path, config, changed, layer, error, match):
    directory = write_sae_lens(tmp_path / "sae", config, **changed)
    with pytest.raises(error, match=match):
        read_autoencoder(directory, layer)


@pytest.mark.parametrize("unit", [True, False])
def test_reads_what_it_writes(tmp_path, unit):
    one = autoencoder(4, layer=2, unit=unit, centred=unit, fingerprint="abc")
    (tmp_path / "mine").mkdir()
    write_autoencoder(tmp_path / "mine", one, {"model_name": "m"})
    found = read_autoencoder(tmp_path / "mine")
    parts = ("encoder", "encoder_bias", "decoder", "decoder_bias")
    for part in parts:
        torch.testing.assert_close(getattr(found, part), getattr(one, part), rtol=1e-6, atol=0)
    names = ("layer", "site", "unit", "centred", "threshold", "largest", "fingerprint")
    assert [getattr(found, name) for name in names] == [2, "block_out", unit, unit, None, None, "abc"]
    assert found.name == "mine"
    # As SAE-Lens computes with these files: inputs of length sqrt(d), outputs scaled back.
    tensors = load_file(tmp_path / "mine" / "sae_weights.safetensors")
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(3)) * 7
    scale = D**0.5 / x.norm(dim=1, keepdim=True) if unit else 1
    z = torch.relu((x * scale - unit * tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"])
    rebuilt = (z @ tensors["W_dec"] + tensors["b_dec"]) / scale
    lengths = x.norm(dim=1, keepdim=True) if unit else 1
    torch.testing.assert_close(
        found.encode(x) @ found.decoder + lengths * found.decoder_bias, rebuilt, rtol=1e-4, atol=1e-3
    )


def test_reads_gemma_scope(tmp_path):
    made = {name: tensor.numpy() for name, tensor in weights().items()}
    numpy.savez(tmp_path / "params.npz", **made)
    found = read_autoencoder(tmp_path, 2)
    assert (found.layer, found.site, found.centred, found.largest) == (2, "block_out", False, None)
    for name, tensor in (("W_enc", found.encoder), ("W_dec", found.decoder), ("threshold", found.threshold)):
        assert numpy.array_equal(tensor.numpy(), made[name])
    with pytest.raises(UsageError, match="--sae-layer"):
        read_autoencoder(tmp_path / "params.npz")
    for released in ("mlp", "att", "res"):
        own = tmp_path / f"gemma-scope-2b-pt-{released}" / "layer_2"
        own.mkdir(parents=True)
        numpy.savez(own / "params.npz", **made)
        if released == "res":
            assert read_autoencoder(own, 2).site == "block_out"
        else:
            with pytest.raises(UsageError, match="give one of -res"):
                read_autoencoder(own, 2)


def test_unpickles_nothing(tmp_path):
    made = {name: tensor.numpy() for name, tensor in weights().items()}
    numpy.savez(tmp_path / "params.npz", **{**made, "W_enc": numpy.array([{"a": 1}], dtype=object)})
    with pytest.raises(BrocaError, match="not a readable archive"):
        read_autoencoder(tmp_path, 0)
    (tmp_path / "params.npz").write_bytes(b"no archive")
    with pytest.raises(BrocaError, match="not a readable archive"):
        read_autoencoder(tmp_path, 0)
    (tmp_path / "params.npz").unlink()
    with pytest.raises(UsageError, match="holds no autoencoder"):
        read_autoencoder(tmp_path, 0)


@pytest.fixture(scope="module")
def uneven():
    texts = {language: tuple(models.sentences(language, 5, 3, (1, 9))) for language in models.LANGUAGES}
    texts["qaa"] = (*texts["qaa"], "")
    return Corpus(texts, "digest", "all")


def naive_firing(llama, texts, one):
    """(texts, texts a feature fires on, mean and mean square of activations), by loops over tokens of a model written out by hand."""
    fired, sums, squares, count = [0] * one.features, [0.0] * one.features, [0.0] * one.features, 0
    for text in texts:
        if not text:
            continue
        ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
        _, layers = models.naive_llama(llama.model, ids)
        values = layers[one.layer][one.site].detach()
        tokens = [naive_encode(one, values[p].tolist()) for p in range(1, len(ids))]
        for f in range(one.features):
            fired[f] += any(token[f] > 0 for token in tokens)
            mean = sum(token[f] for token in tokens) / len(tokens)
            sums[f] += mean
            squares[f] += mean * mean
        count += 1
    return count, fired, [x / count for x in sums], [x / count for x in squares]


def test_firing_is_counted_by_text(llama, uneven):
    # A bias this low leaves features that fire on some texts only.
    one = autoencoder(1, jump=True)
    one = Autoencoder(
        one.encoder, one.encoder_bias - 30, one.decoder, one.decoder_bias, 1, threshold=one.threshold
    )
    two = autoencoder(2, layer=0, site="mlp_out")
    batches = language_batches(llama, uneven)["qaa"]
    assert any(batch.padded for batch in batches) or len(batches) > 1
    for autoencoder_of, found in zip((one, two), firing(llama, batches, [one, two]), strict=True):
        count, fired, *expected = naive_firing(llama, uneven.texts["qaa"], autoencoder_of)
        assert found.texts == count == 5
        assert found.fired.tolist() == fired
        # Features that fire on some of the texts tell a count by text from one by token.
        assert autoencoder_of is two or set(fired) - {0, 5}
        for measured, by_hand in zip((found.activation, found.square), expected, strict=True):
            torch.testing.assert_close(measured, torch.tensor(by_hand).double(), rtol=1e-3, atol=1e-3)
    with pytest.raises(UsageError, match="same layer"):
        firing(llama, batches, [one, one])


@pytest.mark.parametrize("adds_start", [True, False])
def test_random_sequences_are_as_long_as_the_texts(llama, uneven, adds_start):
    loaded = replace(llama, tokenizer=models.tiny_tokenizer(adds_start))
    like = language_batches(loaded, uneven)["qaa"]
    made = random_batches(loaded, like, seed=1)
    lengths = [
        sorted(n for batch in batches for n in batch.attention.sum(1).tolist()) for batches in (like, made)
    ]
    assert lengths[0] == lengths[1]
    for batch in made:
        assert set((batch.ids[:, 0] == llama.tokenizer.bos_token_id).tolist()) == {adds_start}
        inside = batch.ids[batch.counted]
        assert not set(inside.tolist()) & set(llama.tokenizer.all_special_ids)
    first, again, other = (random_batches(loaded, like, seed)[-1].ids for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_direction_by_an_autoencoder(llama, uneven):
    # Features along DiffMean with ever lower biases, and a last one that fires on everything.
    plain = direction_of(llama, uneven, "qaa", "qab")
    delta = plain.vectors["block_out"][1]
    encoder = torch.zeros(D, 41)
    encoder[:, :40] = (delta / delta.norm()).float()[:, None]
    bias = torch.tensor([*(-0.2 * f * float(delta.norm()) for f in range(40)), 1.0])
    one = Autoencoder(encoder, bias, torch.eye(D)[:41], torch.zeros(D), 1, name="planted")
    batches = language_batches(llama, uneven)["qab"]
    (on_target,) = firing(llama, batches, [one])
    (on_random,) = firing(llama, random_batches(llama, batches, 0), [one])
    own = [f for f in range(41) if on_target.fired[f] > 1 and on_random.fired[f] <= 3]
    assert own and 40 not in own, (on_target.fired, on_random.fired)
    rates = {"target_rate": 0.2, "random_rate": 0.6}
    found = direction_of(llama, uneven, "qaa", "qab", "sae", settings=rates, autoencoders=[one])
    expected = torch.zeros(D, dtype=torch.float64)
    for f in own:
        expected[f] = on_target.activation[f]
    torch.testing.assert_close(found.vectors["block_out"][1], expected)
    assert found.metadata["autoencoders"] == [
        {"name": "planted", "layer": 1, "site": "block_out", "features": own}
    ]
    line = expected / expected.norm()
    for site, vectors in found.vectors.items():
        for layer in range(3):
            if (site, layer) != ("block_out", 1):
                delta = plain.vectors[site][layer]
                torch.testing.assert_close(vectors[layer], (line @ delta) * line, rtol=1e-5, atol=1e-6)


def test_the_nearest_autoencoder_speaks_for_other_layers():
    low = Given("block_out", 0, torch.tensor([1.0, 0.0]).double())
    high = Given("block_out", 3, torch.tensor([0.0, 2.0]).double())
    finders = _by_given([high, low], 4)
    delta = torch.tensor([5.0, 7.0]).double()
    texts = Texts(delta, delta, None, delta, delta)
    found = [finders["block_out", layer](texts).vector.tolist() for layer in range(4)]
    assert found == [[1, 0], [5, 0], [0, 7], [0, 2]]
    assert finders["mlp_out", 0](texts).vector.tolist() == [5, 0]


def test_refuses_autoencoders_that_do_not_fit(llama, uneven):
    batches = language_batches(llama, uneven)["qaa"]
    with pytest.raises(UsageError, match="needs an autoencoder"):
        direction_of(llama, uneven, "qaa", "qab", "sae")
    with pytest.raises(UsageError, match="--sae"):
        direction_of(llama, uneven, "qaa", "qab", "lda", autoencoders=[autoencoder()])
    with pytest.raises(UsageError, match="layers 0-2"):
        direction_of(llama, uneven, "qaa", "qab", "sae", autoencoders=[autoencoder(layer=3)])
    normed = replace(llama.anatomy, layout=replace(llama.anatomy.layout, residual=False))  # as Gemma 2
    for site in ("mlp_out", "attn_out"):
        with pytest.raises(UsageError, match=r"after the norm .*residual stream"):
            firing(replace(llama, anatomy=normed), batches, [autoencoder(site=site)])
    assert firing(replace(llama, anatomy=normed), batches, [autoencoder()])
    narrow = weights(d=8)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    one = Autoencoder(*(narrow[name] for name in names), 1)
    with pytest.raises(UsageError, match="64"):
        direction_of(llama, uneven, "qaa", "qab", "sae", autoencoders=[one])
    with pytest.raises(BrocaError, match="another"):
        direction_of(
            llama, uneven, "qaa", "qab", "sae", autoencoders=[autoencoder(name="another", fingerprint="0")]
        )
