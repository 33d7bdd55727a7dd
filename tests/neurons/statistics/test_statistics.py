"""Statistics: saved and read back bit by bit, merged exactly, subtracted, and what they tell of experts."""

from dataclasses import replace

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import load_artifact, save_artifact
from neurons.statistics.statistics import (
    MOMENTS,
    Statistics,
    combine_of,
    load_statistics,
    merge,
    moment_dtype,
    parse_moment,
    subtract,
)
from neurons.text.corpus import read_corpus

LAYERS, WIDTH, EXPERTS = 2, 6, 3
NAMES = ("mlp_act:positive", "mlp_in:sum", "mlp_in:text_absolute", "mlp_in:worst_rank", "block_out:text_mean")
LANGUAGES = ("uk", "ko", "fa")
MOMENTS_OF_PROMPTS = {"answer", "answer_control", "integrated"}


def drawn_statistics(seed, languages=LANGUAGES, names=NAMES, experts=0, responses=False, metadata=None):
    generator = torch.Generator().manual_seed(seed)

    def counts(*shape):
        return torch.randint(1, 10**6, shape, generator=generator)

    moments = {}
    for name in names:
        shape = (LAYERS, 4 if name.startswith("block_out") else WIDTH, len(languages))
        if MOMENTS[name.partition(":")[2]] == torch.int64:
            moments[name] = counts(*shape)
        else:
            moments[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    texts = {k: 3 + i for i, k in enumerate(languages)} if responses else {}
    return Statistics(
        languages=languages,
        tokens=counts(len(languages)) + 10**6,
        texts=counts(len(languages)),
        moments=moments,
        fingerprint="f" * 16,
        routed=counts(LAYERS, experts, len(languages)) if experts else None,
        responses={k: torch.randn(n, LAYERS, WIDTH, generator=generator) for k, n in texts.items()},
        lines={k: torch.arange(n) * 2 for k, n in texts.items()},
        prompts={
            name: counts(len(languages)) for name in names if MOMENTS_OF_PROMPTS & {name.partition(":")[2]}
        },
        metadata={"corpora": [{"digest": f"digest {seed}", "part": "all"}], "model": "m"}
        if metadata is None
        else metadata,
    )


def of(statistics, name, language):
    """A group's values [...] of one language."""
    values = statistics.moments[name] if ":" in name else getattr(statistics, name)
    return values[..., statistics.languages.index(language)]


def assert_same(one, other):
    assert one.languages == other.languages
    assert one.fingerprint == other.fingerprint
    assert one.metadata == other.metadata
    assert (one.routed is None) is (other.routed is None)
    pairs = [(one.tokens, other.tokens), (one.texts, other.texts)]
    if one.routed is not None:
        pairs.append((one.routed, other.routed))
    for group in ("moments", "responses", "lines", "prompts"):
        held, again = getattr(one, group), getattr(other, group)
        assert set(held) == set(again)
        pairs += [(held[name], again[name]) for name in held]
    for first, second in pairs:
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


@pytest.mark.parametrize("experts", [0, EXPERTS])
@pytest.mark.parametrize("responses", [False, True])
def test_round_trip_is_exact(tmp_path, experts, responses):
    one = drawn_statistics(
        0, experts=experts, responses=responses, metadata={"model": "m", "settings": {"b": [1, None]}}
    )
    one.moments["mlp_in:sum"][0, 0] = torch.tensor([1 / 3, 5e-324, -0.0], dtype=torch.float64)
    one.moments["mlp_act:positive"][0, 0, 0] = 2**62 + 1
    one.save(tmp_path / "one")
    again = load_statistics(tmp_path / "one")
    assert_same(one, again)
    assert str(again.moments["mlp_in:sum"][0, 0, 2].item()) == "-0.0"
    assert all(values.dtype == torch.float32 for values in again.responses.values())
    again.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert load_artifact(tmp_path / "one").kind == "statistics"


def test_responses_of_some_languages_come_back_with_theirs(tmp_path):
    one = drawn_statistics(0, responses=True)
    one = replace(one, responses={"fa": one.responses["fa"]}, lines={"fa": one.lines["fa"]})
    one.save(tmp_path / "one")
    assert_same(one, load_statistics(tmp_path / "one"))


def test_a_merged_file_merges_again(tmp_path):
    parts = [drawn_statistics(seed) for seed in range(3)]
    merge(parts[0], parts[1]).save(tmp_path / "two")
    assert_same(
        merge(load_statistics(tmp_path / "two"), parts[2]), merge(merge(parts[0], parts[1]), parts[2])
    )


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_artifact(tmp_path / "set", "neurons", {}, {})
    with pytest.raises(BrocaError, match="holds 'neurons', but 'statistics' is needed"):
        load_statistics(tmp_path / "set")


@pytest.mark.parametrize("experts", [0, EXPERTS])
def test_a_merge_is_the_sum(experts):
    first, second = (
        drawn_statistics(0, experts=experts),
        drawn_statistics(1, ("fa", "en", "uk"), experts=experts),
    )
    both = merge(first, second)
    assert both.languages == ("uk", "ko", "fa", "en")
    names = [*NAMES, "tokens", "texts", *["routed"] * bool(experts)]
    for name in names:
        for language in both.languages:
            held = [of(part, name, language) for part in (first, second) if language in part.languages]
            if len(held) == 1:
                expected = held[0]
            elif name == "mlp_in:worst_rank":
                expected = torch.where(held[0] > held[1], held[0], held[1])
            else:
                expected = held[0] + held[1]
            assert torch.equal(of(both, name, language), expected)
            assert of(both, name, language).dtype == held[0].dtype
    assert both.fingerprint == first.fingerprint
    assert both.metadata["model"] == "m"
    assert [c["digest"] for c in both.metadata["corpora"]] == ["digest 0", "digest 1"]
    assert (both.routed is None) is (experts == 0)


def test_parts_sum_to_the_whole_in_any_order():
    """Counts to the last one; sums too where they are of whole numbers, else to rounding."""
    parts = [drawn_statistics(seed) for seed in range(6)]
    for part in parts:
        part.moments["mlp_in:sum"].mul_(1000).round_()
    forward, backward = parts[0], parts[-1]
    for one, other in zip(parts[1:], parts[-2::-1], strict=True):
        forward, backward = merge(forward, one), merge(backward, other)
    halves = merge(merge(parts[0], merge(parts[1], parts[2])), merge(parts[3], merge(parts[4], parts[5])))
    for result in (forward, backward, halves):
        for name in ("tokens", "texts", "mlp_act:positive", "mlp_in:sum"):
            for language in LANGUAGES:
                expected = of(parts[0], name, language).clone()
                for part in parts[1:]:
                    expected += of(part, name, language)
                assert torch.equal(of(result, name, language), expected)
        for language in LANGUAGES:
            ranks = torch.stack([of(part, "mlp_in:worst_rank", language) for part in parts])
            assert torch.equal(of(result, "mlp_in:worst_rank", language), ranks.amax(0))
            exact = sum(of(part, "mlp_in:text_absolute", language) for part in parts)
            found = of(result, "mlp_in:text_absolute", language)
            assert torch.allclose(found, exact, rtol=0, atol=1e-14)
    assert [c["digest"] for c in forward.metadata["corpora"]] == [f"digest {seed}" for seed in range(6)]


def test_a_merge_keeps_the_rates_of_unknown_tokens_of_both():
    first, second = (drawn_statistics(seed, responses=False) for seed in (1, 2))
    first.metadata["unknown"] = {"ko": 0.3, "fa": 0.5}
    second.metadata["unknown"] = {"uk": 0.9, "fa": 0.7}
    assert merge(first, second).metadata["unknown"] == {"uk": 0.9, "ko": 0.3, "fa": 0.7}


def test_a_merge_changes_neither_part():
    first, second = drawn_statistics(0, experts=EXPERTS), drawn_statistics(1, experts=EXPERTS)
    merge(first, second)
    assert_same(first, drawn_statistics(0, experts=EXPERTS))
    assert_same(second, drawn_statistics(1, experts=EXPERTS))


def test_responses_of_different_languages_come_together():
    first = drawn_statistics(0, ("uk", "ko"), responses=True)
    second = drawn_statistics(1, ("fa",), responses=True)
    both = merge(first, second)
    assert set(both.responses) == set(both.lines) == set(LANGUAGES)
    assert torch.equal(both.responses["fa"], second.responses["fa"])
    assert torch.equal(both.lines["ko"], first.lines["ko"])


def test_responses_of_one_language_are_refused():
    with pytest.raises(UsageError, match="responses"):
        merge(drawn_statistics(0, responses=True), drawn_statistics(1, ("fa", "en"), responses=True))


def test_the_same_text_is_refused_only_where_it_would_count_twice():
    with pytest.raises(UsageError, match="twice"):
        merge(drawn_statistics(0), drawn_statistics(0))
    both = merge(drawn_statistics(0, ("uk", "ko")), drawn_statistics(0, ("fa",)))
    assert both.languages == LANGUAGES
    # Text that came in by an earlier merge counts twice as well.
    with pytest.raises(UsageError, match="twice"):
        merge(merge(drawn_statistics(1), drawn_statistics(2)), drawn_statistics(2))


@pytest.mark.parametrize("language", ["en", "fr"])
def test_text_of_one_language_in_two_corpora_is_refused(tmp_path, language):
    """The digest of a corpus covers its languages together, so that it tells nothing of one of them."""
    for code in ("de", "en", "fr"):
        (tmp_path / f"{code}.txt").write_text(f"text in {code}\n" * 4)
    one, other = (read_corpus(tmp_path, codes) for codes in (("en", "fr"), (language, "de")))
    first, second = (
        drawn_statistics(
            seed,
            corpus.languages,
            metadata={"corpora": [{**corpus.provenance, "digests": corpus.digests}]},
        )
        for seed, corpus in enumerate((one, other))
    )
    with pytest.raises(UsageError, match="twice"):
        merge(first, second)
    merge(first, replace(second, metadata={"corpora": [other.provenance]}))  # as files had them before


def test_statistics_that_name_no_corpus_merge():
    foreign = drawn_statistics(0, metadata={})
    assert torch.equal(merge(foreign, foreign).tokens, foreign.tokens * 2)


def test_prompts_are_saved_and_summed(tmp_path):
    names = ("mlp_act:answer", "mlp_act:answer_control")
    first, second = drawn_statistics(0, names=names), drawn_statistics(1, ("fa", "en"), names)
    first.save(tmp_path / "one")
    assert_same(first, load_statistics(tmp_path / "one"))
    both = merge(first, second)
    for name in names:
        one, other = first.prompts[name].tolist(), second.prompts[name].tolist()
        assert both.prompts[name].tolist() == [one[0], one[1], one[2] + other[0], other[1]]
        assert both.prompts[name].dtype == torch.int64
    with pytest.raises(UsageError, match="over prompts"):
        merge(first, replace(second, prompts={}))


def test_unlike_statistics_are_refused():
    first, second = drawn_statistics(0), drawn_statistics(1)
    with pytest.raises(UsageError, match=r"two models, fingerprints f+ and 0+"):
        merge(first, replace(second, fingerprint="0" * 16))
    with pytest.raises(UsageError, match=r": mlp_act:positive, mlp_in:sum.*, and mlp_act:positive$"):
        merge(first, drawn_statistics(1, names=NAMES[:1]))
    with pytest.raises(UsageError, match=r"text_mean, and .*text_mean, responses"):
        merge(first, drawn_statistics(1, responses=True))
    with pytest.raises(BrocaError, match="1 and 3 experts"):
        merge(first, drawn_statistics(1, experts=3))
    wider = {**second.moments, "mlp_in:sum": torch.zeros(LAYERS, WIDTH + 1, 3, dtype=torch.float64)}
    with pytest.raises(BrocaError, match="shape of mlp_in:sum"):
        merge(first, replace(second, moments=wider))


def test_moments_come_together_as_they_are_made():
    for name in MOMENTS:
        expected = torch.maximum if name == "worst_rank" else torch.add
        assert combine_of(f"mlp_in:{name}") is expected


def test_subtracting_a_prefix():
    whole, prefix = (drawn_statistics(seed, names=NAMES[:1]) for seed in (0, 1))
    whole = replace(whole, tokens=torch.tensor([10, 5, 7]))
    prefix = replace(prefix, tokens=torch.tensor([4, 5, 9]))
    rest = subtract(whole, prefix)
    assert rest.tokens.tolist() == [6, 1, 1]
    counts = [part.moments["mlp_act:positive"].flatten().tolist() for part in (whole, prefix)]
    expected = [max(0, a - b) for a, b in zip(*counts, strict=True)]
    assert 0 in expected
    assert rest.moments["mlp_act:positive"].flatten().tolist() == expected
    assert rest.moments["mlp_act:positive"].dtype == rest.tokens.dtype == torch.int64
    assert rest.metadata == {**whole.metadata, "subtracted": prefix.metadata["corpora"]}
    assert rest.routed is None
    assert torch.equal(rest.texts, whole.texts)


def test_subtracting_a_prefix_of_experts():
    whole, prefix = (drawn_statistics(seed, names=NAMES[:1], experts=EXPERTS) for seed in (0, 1))
    expected = [max(0, a - b) for a, b in zip(whole.routed.flatten(), prefix.routed.flatten(), strict=True)]
    rest = subtract(whole, prefix)
    assert rest.routed.flatten().tolist() == expected
    assert torch.equal(rest.seen(), rest.routed.repeat_interleave(WIDTH // EXPERTS, dim=1))


def test_what_cannot_be_subtracted_is_refused():
    counts = drawn_statistics(0, names=NAMES[:1])
    with pytest.raises(UsageError, match="hold mlp_in:sum"):
        subtract(drawn_statistics(0, names=NAMES[:2]), drawn_statistics(1, names=NAMES[:2]))
    with pytest.raises(UsageError, match="prefix has languages uk, fa, the whole uk, ko, fa"):
        subtract(counts, drawn_statistics(1, ("uk", "fa"), NAMES[:1]))
    with pytest.raises(UsageError, match="two models"):
        subtract(counts, replace(counts, fingerprint="0"))
    with pytest.raises(UsageError, match="hold responses"):
        subtract(*(drawn_statistics(seed, names=NAMES[:1], responses=True) for seed in (0, 1)))


def test_a_dense_model_shows_every_token_to_every_neuron():
    dense = drawn_statistics(0)
    assert dense.experts == 1
    assert torch.equal(dense.seen(), dense.tokens)
    with pytest.raises(UsageError, match="no experts"):
        dense.routing_fraction()


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], ("mlp_out:text_mean", *NAMES), ("mlp_up:worst_rank",)])
def test_a_neuron_sees_the_tokens_of_its_expert(names):
    mixture = drawn_statistics(0, names=names, experts=EXPERTS)
    if "mlp_out:text_mean" in names:  # as wide as the residual, not as the neurons
        mixture.moments["mlp_out:text_mean"] = torch.zeros(LAYERS, 4, 3, dtype=torch.float64)
    assert mixture.experts == EXPERTS
    seen, share = mixture.seen(), mixture.routing_fraction()
    assert seen.shape == (LAYERS, WIDTH, 3)
    assert seen.dtype == torch.int64
    assert share.shape == (LAYERS, EXPERTS, 3)
    assert share.dtype == torch.float64
    for layer in range(LAYERS):
        for k in range(3):
            for expert in range(EXPERTS):
                routed, tokens = int(mixture.routed[layer, expert, k]), int(mixture.tokens[k])
                assert float(share[layer, expert, k]) == routed / tokens
                for j in range(WIDTH // EXPERTS):
                    assert int(seen[layer, expert * (WIDTH // EXPERTS) + j, k]) == routed


def test_experts_without_a_moment_of_their_neurons():
    with pytest.raises(UsageError, match="no moment"):
        drawn_statistics(0, names=("block_out:text_mean",), experts=EXPERTS).seen()


def test_means():
    statistics = drawn_statistics(0)
    tokens, texts = statistics.token_mean("mlp_in"), statistics.text_mean("block_out")
    assert tokens.dtype == texts.dtype == torch.float64
    for k in range(3):
        total = float(statistics.moments["mlp_in:sum"][1, 3, k])
        assert float(tokens[1, 3, k]) == total / int(statistics.tokens[k])
        total = float(statistics.moments["block_out:text_mean"][1, 3, k])
        assert float(texts[1, 3, k]) == total / int(statistics.texts[k])


def test_a_moment_that_was_not_recorded_is_named():
    statistics = drawn_statistics(0, names=NAMES[:2])
    assert statistics.moment("mlp_in:sum") is statistics.moments["mlp_in:sum"]
    with pytest.raises(
        UsageError, match=r"have no mlp_in:square .they have mlp_act:positive, mlp_in:sum.: record again"
    ):
        statistics.moment("mlp_in:square")
    with pytest.raises(UsageError, match="have no attn_in:sum"):
        statistics.token_mean("attn_in")
    with pytest.raises(UsageError, match="they have no moments"):
        replace(statistics, moments={}).moment("mlp_in:sum")


def test_names_of_moments():
    assert parse_moment("mlp_act:positive") == ("mlp_act", "positive")
    for wrong in ("mlp_act", "mlp_act:", "nowhere:sum", "mlp_act:nothing", ""):
        with pytest.raises(ValueError, match="is not site:moment"):
            parse_moment(wrong)
    assert moment_dtype("positive") == moment_dtype("worst_rank") == torch.int64
    assert moment_dtype("text_absolute") == torch.float64
