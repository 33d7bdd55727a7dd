"""Selectivity, lift and shift of autoencoder features against loops in float64, and planted features."""

import statistics

import models
import pytest
import torch

from editing.directions.autoencoder import Autoencoder, Firing
from editing.directions.estimation import direction_of
from editing.directions.feature_lift import feature_lifts, half_texts, language_signs
from editing.directions.recorded import record_texts
from editing.directions.sae_recording import firing, text_codes
from editing.directions.sae_shift import SaeShift, linear_readout, masked_shift, selectivity
from editing.methods.material import Material
from editing.methods.subspace_ablation import AblateSubspace
from neurons.errors import BrocaError, UsageError
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

D = 64
ALPHAS = (0.5, 2.0, 5.0, 15.0)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_selectivity_equals_the_formula():
    codes = {"s": drawn(9, 5, seed=1).double().abs(), "t": drawn(7, 5, seed=2).double().abs() * 2}
    codes["s"][:, 3] = codes["t"][:, 3] = 0.0  # dead
    codes["s"][:, 4] = 1.0  # constant
    of = {k: Firing(len(c), (c > 0).sum(0), c.mean(0), c.square().mean(0)) for k, c in codes.items()}
    found = selectivity(of["s"], of["t"])
    for f in range(5):
        s, t = codes["s"][:, f].tolist(), codes["t"][:, f].tolist()
        expected = (statistics.fmean(t) - statistics.fmean(s)) / (
            statistics.pstdev(t) + statistics.pstdev(s) + 1e-6
        )
        assert float(found[f]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found[3] == 0


@pytest.fixture(scope="module")
def corpus():
    """Line-parallel text; one line is blank in one language."""
    texts = {language: tuple(models.sentences(language, 24, 3, (2, 9))) for language in models.LANGUAGES}
    texts["qaa"] = (*texts["qaa"][:4], "", *texts["qaa"][5:])
    return Corpus(texts, "digest", "all")


def naive_signs(llama, corpus):
    """1 for tokens that stand five times in the target's text and never in the source's, -1 the other way."""
    counts = {language: torch.zeros(len(llama.tokenizer)) for language in ("qaa", "qab")}
    for language, of_tokens in counts.items():
        for text in corpus.texts[language]:
            for token in llama.tokenizer(text, add_special_tokens=False)["input_ids"]:
                of_tokens[token] += 1
    signs = torch.zeros(len(llama.tokenizer)).double()
    for token in range(len(signs)):
        source, target = float(counts["qaa"][token]), float(counts["qab"][token])
        if target >= 5 and source == 0:
            signs[token] = 1
        if source >= 5 and target == 0:
            signs[token] = -1
    return signs


@pytest.mark.parametrize("supported", [True, False])
def test_lift_equals_the_formula(llama, corpus, monkeypatch, supported):
    monkeypatch.setattr("editing.directions.feature_lift.supports_partial_forward", lambda *_: supported)
    batches = language_batches(llama, corpus)
    signs = language_signs(llama, batches["qaa"], batches["qab"])
    expected_signs = naive_signs(llama, corpus)
    # The space stands in both languages, which is neither here nor there.
    assert torch.equal(signs[: len(expected_signs)], expected_signs)
    assert {-1.0, 0.0, 1.0} == set(signs.tolist())
    neurons, layer = [5, 40], 1
    # A feature that writes what a neuron writes, so that the model by hand can add it.
    decoder = drawn(4, D)
    decoder[[1, 3]] = llama.model.model.layers[layer].mlp.down_proj.weight.detach()[:, neurons].T
    sae = Autoencoder(drawn(D, 4), torch.zeros(4), decoder, torch.zeros(D), layer)
    prompts = half_texts(batches["qaa"], 5)
    found = feature_lifts(llama, sae, torch.tensor([1, 3]), prompts, signs, ALPHAS)

    def margin(ids, bump=None):
        logits, _ = models.naive_llama(llama.model, ids, bump)
        return float(logits[-1].detach().softmax(-1) @ expected_signs)

    for number, neuron in enumerate(neurons):
        slopes = []
        for alpha in ALPHAS:
            changes = [margin(ids, {(layer, len(ids) - 1, neuron): alpha}) - margin(ids) for ids in prompts]
            slopes.append(statistics.fmean(changes) / alpha)
        assert float(found[number]) == pytest.approx(statistics.median(slopes), rel=1e-3, abs=1e-7)
        assert abs(float(found[number])) > 1e-5


def test_prompts_are_the_first_halves_of_texts(llama, corpus):
    batches = language_batches(llama, corpus)["qaa"]
    whole = {
        (0, *ids[: (len(ids) + 1) // 2])
        for text in corpus.texts["qaa"]
        if (ids := llama.tokenizer(text, add_special_tokens=False)["input_ids"])
    }
    assert {*map(tuple, half_texts(batches, 100))} == whole
    few = half_texts(batches, 6)
    assert len(few) == 6 and {*map(tuple, few)} < whole
    lengths = sorted(map(len, few))
    assert lengths[0] < lengths[-1]  # short and long ones


def test_shift_equals_the_formula():
    rows, source, target = drawn(6, D), drawn(9, 6, seed=1).double().abs(), drawn(8, 6, seed=2).double().abs()
    target = target + torch.tensor([3.0, 0, 0, 1, 0, 0]).double()
    pairs = (torch.tensor([0, 2, 3, 4, 8]), torch.tensor([1, 2, 4, 6, 7]))
    found = masked_shift(rows, source, target, pairs)
    differences = [
        [float(target[t, f] - source[s, f]) for f in range(6)]
        for s, t in zip(*map(torch.Tensor.tolist, pairs), strict=True)
    ]
    means = [statistics.fmean(row[f] for row in differences) for f in range(6)]
    size = sum(m * m for m in means) ** 0.5
    expected = torch.zeros(D).double()
    for f in range(6):
        expected += means[f] / size * rows[f].double()
    torch.testing.assert_close(found.vector, expected)
    _, _, right = torch.linalg.svd(torch.tensor(differences).double())
    projector = right[: found.shift.rank].T @ right[: found.shift.rank]
    english = projector @ source.mean(0)
    english = english / english.norm()
    torch.testing.assert_close(found.suppressed, english @ rows.double())
    torch.testing.assert_close(found.activity, torch.cat([source @ english, target @ english]))


def test_nothing_to_read_has_no_slope():
    still, moving = torch.ones(4).double(), drawn(4).double()
    assert linear_readout(moving, still) == (0.0, 1.0, 0.0)
    assert linear_readout(still, moving) == (0.0, pytest.approx(float(moving.mean())), 0.0)


@pytest.fixture(scope="module")
def planted(llama, corpus):
    """Features at the last layer that fire on the target or on the source, and raise or lower the target's tokens."""
    plain = direction_of(llama, corpus, "qaa", "qab")
    delta = plain.vectors["block_out"][2]
    batches = language_batches(llama, corpus)
    signs = language_signs(llama, batches["qaa"], batches["qab"])[: len(llama.model.lm_head.weight)]
    raising = signs.float() @ llama.model.lm_head.weight.detach() * llama.model.model.norm.weight.detach()
    raising = 3 * raising / raising.norm()
    along = (delta / delta.norm()).float()
    encoder = torch.stack([along, along, -along, torch.zeros(D), along], 1)
    # Selective and raising; selective and lowering; of the source; on everything alike; selective and raising, weaker.
    bias = torch.tensor([40.0, 40, 40, 1, 35])
    decoder = torch.stack([raising, -raising, raising, raising, raising + drawn(D, seed=5)])
    sae = Autoencoder(encoder, bias, decoder, torch.zeros(D), 2, name="planted")
    return sae, plain


def test_finds_the_planted_features(llama, corpus, planted):
    sae, plain = planted
    found = direction_of(llama, corpus, "qaa", "qab", "sae-shift", autoencoders=[sae])
    (notes,) = found.metadata["autoencoders"]
    assert notes["features"] == [0, 4]
    assert min(notes["selectivity"]) > 0 and min(notes["lift"]) > 0
    batches = language_batches(llama, corpus)
    kept = torch.tensor([0, 4])
    (lines_s, (codes_s,)), (lines_t, (codes_t,)) = (
        text_codes(llama, batches[k], [sae], [kept]) for k in ("qaa", "qab")
    )
    assert 4 not in lines_s and 4 in lines_t
    pairs = (torch.arange(23), torch.tensor([t for t in range(24) if t != 4]))
    expected = masked_shift(sae.decoder[kept], codes_s, codes_t, pairs)
    line, delta = expected.vector / expected.vector.norm(), plain.vectors["block_out"][2]
    vector = found.vectors["block_out"][2]
    torch.testing.assert_close(vector, (line @ delta) * line, rtol=1e-5, atol=1e-6)
    measures = {name: values[2] for name, values in found.metadata["measures"]["block_out"].items()}
    # Strength lambda / measure gives the paper's vector.
    torch.testing.assert_close(vector, measures["lambda"] * expected.vector, rtol=1e-5, atol=1e-6)
    suppressed = found.subspace("block_out", 2)
    length = float(expected.suppressed.norm())
    torch.testing.assert_close(suppressed[:, 0] * length, expected.suppressed, rtol=1e-5, atol=1e-6)
    assert (measures["features"], measures["read"]) == (2, 1)
    recorded = record_texts(llama, {k: batches[k] for k in ("qaa", "qab")})
    states = torch.cat([recorded.outputs[k]["block_out"][:, 2] for k in ("qaa", "qab")]).double()
    values, activity = (states @ suppressed[:, 0]).tolist(), expected.activity.tolist()
    slope, offset = statistics.linear_regression(values, activity)
    assert measures["slope"] == pytest.approx(slope * length, rel=1e-4)
    assert measures["offset"] == pytest.approx(offset * length, rel=1e-4, abs=1e-6)
    assert measures["readout"] == pytest.approx(statistics.correlation(values, activity) ** 2, rel=1e-4)
    # The other layers have the line, and nothing to ablate.
    for layer in (0, 1):
        delta = plain.vectors["block_out"][layer]
        torch.testing.assert_close(
            found.vectors["block_out"][layer], (line @ delta) * line, rtol=1e-5, atol=1e-6
        )
    plan = AblateSubspace().plan_for(Material(llama, directions=(found,), layers=(2,), blocks=("mlp",)))
    assert plan.edits[0].left.shape == (D, 1)
    with pytest.raises(BrocaError, match="empty"):
        AblateSubspace().plan_for(Material(llama, directions=(found,), layers=(1,)))


def test_random_features_are_a_control_of_the_same_number(llama, corpus, planted):
    sae, _ = planted
    found = direction_of(
        llama, corpus, "qaa", "qab", "sae-shift", autoencoders=[sae], settings={"features": "random"}
    )
    (notes,) = found.metadata["autoencoders"]
    (fires,) = firing(llama, language_batches(llama, corpus)["qab"], [sae])
    assert len(notes["features"]) == 2 and not {0, 4} & {*notes["features"]}
    assert all(fires.fired[f] > 0 for f in notes["features"]) and "lift" not in notes


def test_refuses_what_it_cannot_use(llama, corpus, planted):
    sae, _ = planted
    with pytest.raises(UsageError, match="needs an autoencoder"):
        direction_of(llama, corpus, "qaa", "qab", "sae-shift")
    uneven = Corpus({**corpus.texts, "qab": corpus.texts["qab"][:5]}, "digest", "all")
    with pytest.raises(UsageError, match="parallel"):
        direction_of(llama, uneven, "qaa", "qab", "sae-shift", autoencoders=[sae])
    # The one candidate lowers the target's tokens.
    lowering = Autoencoder(sae.encoder[:, [1]], sae.encoder_bias[[1]], sae.decoder[[1]], sae.decoder_bias, 2)
    with pytest.raises(BrocaError, match="none of the 1 most selective"):
        direction_of(llama, corpus, "qaa", "qab", "sae-shift", autoencoders=[lowering])
    with pytest.raises(BrocaError, match="other features"):
        SaeShift(features="random")._chosen(
            sae,
            *(
                Firing(2, torch.tensor([f] * 5), torch.full((5,), f).double(), torch.ones(5).double() * f)
                for f in (0, 1)
            ),
            lambda *_: torch.ones(5).double(),
        )
