"""Attribution of answers, against finite differences of a hand-written llama and against plain autograd."""

import json

import models
import pytest
import torch

from neurons.architectures.sites import site_hooks
from neurons.errors import UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.identify import require_prompts
from neurons.recording import answers
from neurons.recording.answers import merge_moments, record_answers
from neurons.recording.recomputation import recomputing
from neurons.text.prompts import EXAMPLE, Prompt, Prompts, answer_tokens, read_prompts

ORDER = ("qac", "qaa")
LAYERS, WIDTH = 3, 48
# Of different lengths, so that a batch of them is padded.
OF = {
    "qac": (
        Prompt("stop the trust", " sport"),
        Prompt("nut", " pop"),
        Prompt("root un quot nut pop opus tosu", " runt"),
    ),
    "qaa": (Prompt("bead cafe ebb", " add"), Prompt("face", " feed")),
}


def answer_token(tokenizer, prompt):
    """The prompt's tokens and the first token of its answer."""
    ids, answer = answer_tokens(tokenizer, prompt)
    return ids, answer[0]


def prompts_of(of):
    return Prompts(dict(of), "digest")


def naive_probability(model, row, answer, bump=None):
    logits, layers = models.naive_llama(model, row, bump)
    return float(logits[-1].detach().softmax(-1)[answer]), layers


def naive_s(model, row, answer):
    """CULNIG's s by autograd on the model itself, one prompt alone, float64 [layers, width]."""
    activations = {}
    handles = [
        block.mlp.gate_proj.register_forward_hook(
            lambda module, args, output, layer=layer: activations.setdefault(
                layer, output.requires_grad_(True)
            )
        )
        for layer, block in enumerate(model.model.layers)
    ]
    try:
        p = model(torch.tensor([row])).logits[0, -1].softmax(-1)[answer]
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(p, [activations[layer] for layer in range(LAYERS)])
    result = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)
    for layer, gradient in enumerate(gradients):
        for j in range(WIDTH):
            products = [
                float(activations[layer][0, t, j].detach()) * float(gradient[0, t, j])
                for t in range(len(row))
            ]
            result[layer, j] = float(p.detach()) * max(products)
    return result


@pytest.mark.parametrize("moment", ["answer", "answer_recognition", "answer_control"])
def test_scores_equal_autograd_of_one_prompt_at_a_time(llama, moment):
    result = record_answers(llama, prompts_of(OF), moment)
    assert result.languages == ORDER
    assert result.prompts[moment].tolist() == [3, 2]
    assert result.fingerprint == llama.fingerprint
    negative = 0
    for k, language in enumerate(ORDER):
        wanted = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)
        for prompt in OF[language]:
            s = naive_s(llama.model, *answer_token(llama.tokenizer, prompt))
            negative += int((s < 0).sum())
            wanted += s.clamp(min=0) if moment == "answer_control" else s
        values = result.moments[f"mlp_act:{moment}"][..., k]
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert negative > 20  # or the control's 0 would not have been tried


STEPS = 4
PLACES = [(0, 0), (0, 31), (1, 7), (1, 47), (2, 3), (2, 20)]


def naive_integrated(model, row, answer, steps):
    """(layer, neuron) -> integrated gradient by central differences, all neurons of the layer moved along.

    The neurons of a layer are scaled together at the last token, as in the paper's code.
    """
    _, layers = naive_probability(model, row, answer)
    last, step = len(row) - 1, 1e-4
    result = {}
    for layer, neuron in PLACES:
        given = layers[layer]["mlp_in"][last].detach()
        total = 0.0
        for i in range(1, steps + 1):
            # From a to (i / m) * a, for every neuron of this layer.
            bump = {(layer, last, j): (i / steps - 1) * float(given[j]) for j in range(WIDTH)}
            ends = []
            for sign in (1, -1):
                moved = dict(bump)
                moved[layer, last, neuron] += sign * step
                ends.append(naive_probability(model, row, answer, moved)[0])
            total += (ends[0] - ends[1]) / (2 * step)
        result[layer, neuron] = float(given[neuron]) / steps * total
    return result


def test_integrated_gradients_equal_finite_differences(llama):
    result = record_answers(llama, prompts_of(OF), "integrated", steps=STEPS)
    assert result.prompts["integrated"].tolist() == [3, 2]
    for k, language in enumerate(ORDER):
        wanted = dict.fromkeys(PLACES, 0.0)
        for prompt in OF[language]:
            row, answer = answer_token(llama.tokenizer, prompt)
            for place, value in naive_integrated(llama.model, row, answer, STEPS).items():
                wanted[place] += value
        values = result.moments["mlp_in:integrated"][..., k]
        largest = max(abs(value) for value in wanted.values())
        for (layer, neuron), value in wanted.items():
            assert float(values[layer, neuron]) == pytest.approx(value, rel=1e-2, abs=1e-3 * largest)


def test_a_fine_integral_is_what_the_layer_brings(llama):
    prompt = OF["qac"][0]
    row, answer = answer_token(llama.tokenizer, prompt)
    result = record_answers(llama, prompts_of({"qac": (prompt,)}), "integrated", steps=400)
    with_all, layers = naive_probability(llama.model, row, answer)
    last = len(row) - 1
    for layer in range(LAYERS):
        given = layers[layer]["mlp_in"][last].detach()
        without, _ = naive_probability(
            llama.model, row, answer, {(layer, last, j): -float(given[j]) for j in range(WIDTH)}
        )
        sum_of_all = float(result.moments["mlp_in:integrated"][layer].sum())
        assert sum_of_all == pytest.approx(with_all - without, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("moment", ["answer", "answer_control", "integrated"])
def test_prompts_of_different_length_do_not_see_each_other(llama, moment):
    seen = []

    def look(values, _):
        seen.append(tuple(values.shape[:2]))

    done = []
    with site_hooks(llama.anatomy, {("block_out", 0): look}):
        several = record_answers(llama, prompts_of({"qac": OF["qac"]}), moment, STEPS, done.append)
    assert done == [3]
    assert seen[0][0] == 3
    (name,) = several.moments
    alone = [
        record_answers(llama, prompts_of({"qac": (prompt,)}), moment, STEPS).moments[name]
        for prompt in OF["qac"]
    ]
    total = torch.stack(alone).sum(0)
    largest = float(total.abs().max())
    torch.testing.assert_close(several.moments[name], total, rtol=1e-3, atol=1e-4 * largest)
    assert all(float((total - single).abs().max()) > 1e-2 * largest for single in alone[:2])


def test_moments_are_merged(llama):
    recorded = [record_answers(llama, prompts_of(OF), moment) for moment in ("answer", "answer_control")]
    both = merge_moments(recorded)
    assert set(both.moments) == {"mlp_act:answer", "mlp_act:answer_control"}
    assert {name: counts.tolist() for name, counts in both.prompts.items()} == {
        "answer": [3, 2],
        "answer_control": [3, 2],
    }
    other = record_answers(llama, prompts_of({"qac": OF["qac"]}), "answer")
    with pytest.raises(UsageError, match=r"qac, qaa.*qac"):
        merge_moments([recorded[0], other])


def probability_with(loaded, row, answer, site, layer, change):
    """The answer's probability with ``change(values, expert, tokens)`` as the values of one layer's experts."""

    def read(values, routed):
        return change(values.clone(), routed.expert, routed.tokens)

    # Layers without hooks run transformers' own experts, which do not support float64.
    others = {(site, other): lambda values, routed: None for other in range(loaded.anatomy.layers)}
    with site_hooks(loaded.anatomy, others | {(site, layer): read}), torch.no_grad():
        return float(loaded.model(torch.tensor([row])).logits[0, -1].softmax(-1)[answer])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_answers_are_traced_through_experts(checkpoint_of, family):
    """Against finite differences of the probability, for single neurons of experts at single tokens."""
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    exact = load_model(str(checkpoint_of(family)), device="cpu")
    exact.model.double()
    anatomy = loaded.anatomy
    width, prompts, steps = anatomy.expert_width, prompts_of({"qaa": OF["qaa"]}), 4
    scores = record_answers(loaded, prompts, "answer").moments["mlp_act:answer"][..., 0]
    integrated = record_answers(loaded, prompts, "integrated", steps).moments["mlp_in:integrated"][..., 0]
    layer, bump = anatomy.layers - 1, 3e-2  # norms compute in float32: smaller bumps are lost in rounding
    expected = torch.zeros(2, anatomy.neurons, dtype=torch.float64)
    for prompt in OF["qaa"]:
        row, answer = answer_token(loaded.tokenizer, prompt)
        values = {site: torch.zeros(len(row), anatomy.neurons).double() for site in ("mlp_act", "mlp_in")}

        def keep(given, expert, tokens, into):
            into[tokens, expert * width : (expert + 1) * width] = given
            return given

        for site, into in values.items():
            p = probability_with(
                exact, row, answer, site, layer, lambda g, e, t, into=into: keep(g, e, t, into)
            )

        def slope(site, t, unit, fraction, row=row, answer=answer):
            """dp/da at a fraction of the activations of all neurons of the layer at token t."""
            ends = []
            for sign in (1, -1):

                def change(given, expert, tokens, sign=sign):
                    here = tokens == t
                    given[here] *= fraction
                    if expert == unit // width:
                        given[here, unit % width] += sign * bump
                    return given

                ends.append(probability_with(exact, row, answer, site, layer, change))
            return (ends[0] - ends[1]) / (2 * bump)

        for unit in range(0, anatomy.neurons, 7):
            a = values["mlp_act"][:, unit]
            expected[0, unit] += p * max(
                float(a[t]) * slope("mlp_act", t, unit, 1.0) if a[t] else 0.0 for t in range(len(row))
            )
            end = float(values["mlp_in"][-1, unit])
            slopes = [slope("mlp_in", len(row) - 1, unit, i / steps) for i in range(1, steps + 1)]
            expected[1, unit] += end * sum(slopes) / steps if end else 0.0
    looked = torch.arange(0, anatomy.neurons, 7)
    for result, naive in ((scores, expected[0]), (integrated, expected[1])):
        size = float(naive.abs().max())
        assert size > 0
        torch.testing.assert_close(result[layer, looked], naive[looked], rtol=2e-3, atol=2e-3 * size)
    (first, *_) = OF["qaa"]
    alone = record_answers(loaded, prompts_of({"qaa": (first,)}), "integrated", steps).moments[
        "mlp_in:integrated"
    ]
    silent = (alone.view(anatomy.layers, anatomy.experts, width) == 0).all(2).sum(1)
    # The attribution is 0 in experts to which the last token is not routed.
    assert silent.tolist() == [anatomy.experts - loaded.model.config.num_experts_per_tok] * anatomy.layers


def test_experts_in_a_batch_are_those_of_each_prompt_alone(checkpoint_of):
    loaded = load_model(str(checkpoint_of("mixtral")), device="cpu")
    for moment in ("answer", "integrated"):
        (batched,) = record_answers(loaded, prompts_of({"qac": OF["qac"]}), moment, 3).moments.values()
        alone = [
            next(iter(record_answers(loaded, prompts_of({"qac": (prompt,)}), moment, 3).moments.values()))
            for prompt in OF["qac"]
        ]
        torch.testing.assert_close(batched, sum(alone), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("moment", ["answer", "integrated"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_activations_are_recomputed_where_they_do_not_fit(checkpoint_of, monkeypatch, family, moment):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    found, recomputed = [], []

    def entered(anatomy):
        recomputed.append(moment)
        return recomputing(anatomy)

    monkeypatch.setattr(answers, "recomputing", entered)
    for recomputes in (False, True):
        monkeypatch.setattr(answers, "batches_for", lambda *_, again=recomputes: (512, again))
        found += record_answers(loaded, prompts_of(OF), moment, STEPS).moments.values()
    assert recomputed
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)
    assert found[0].any()


def test_what_cannot_be_traced_is_refused(llama):
    long = Prompt("nut " * 200, " pop")
    with pytest.raises(UsageError, match=r"'qac'.* 128"):
        record_answers(llama, prompts_of({"qac": (long,)}), "answer")


def test_prompts_may_be_as_long_as_the_context(llama, monkeypatch):
    monkeypatch.setattr(llama.model.config, "max_position_embeddings", 2500)
    long = Prompt("nut " * 2400, " pop")
    assert record_answers(llama, prompts_of({"qac": (long,)}), "answer").moments["mlp_act:answer"].any()


def write(directory, **files):
    directory.mkdir(exist_ok=True)
    for language, content in files.items():
        (directory / f"{language}.jsonl").write_text(content, encoding="utf-8")
    return directory


GOOD = '{"prompt": "nut", "answer": " pop"}\n'


def test_prompts_are_read_in_the_order_of_the_file(tmp_path):
    lines = [{"prompt": prompt.prompt, "answer": prompt.answer} for prompt in OF["qac"]]
    content = "\n\n".join(json.dumps(line) for line in lines)
    directory = write(tmp_path / "prompts", qac=content, qaa=GOOD)
    result = read_prompts(directory)
    assert list(result.of) == ["qaa", "qac"]
    assert result.of["qac"] == OF["qac"]
    assert list(read_prompts(directory, ORDER).of) == list(ORDER)
    assert read_prompts(directory).digest == result.digest
    write(directory, qaa=GOOD.replace("pop", "nut"))
    assert read_prompts(directory).digest != result.digest


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        "3",
        "null",
        '"text"',
        '{"prompt": "nut"}',
        '{"answer": " pop"}',
        '{"prompt": "", "answer": " pop"}',
        '{"prompt": "nut", "answer": ""}',
        '{"prompt": 3, "answer": " pop"}',
        '{"prompt": "nut", "answer": [" pop"]}',
    ],
)
def test_a_line_that_is_no_prompt_is_named_with_an_example(tmp_path, line):
    directory = write(tmp_path / "prompts", qac=GOOD + line + "\n" + GOOD)
    with pytest.raises(UsageError, match=r"qac\.jsonl: line 2") as caught:
        read_prompts(directory)
    assert EXAMPLE in str(caught.value)


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    directory = write(tmp_path / "prompts", qac=GOOD)
    with (directory / "qac.jsonl").open("ab") as stream:
        stream.write(b'{"prompt": "\xff\xfe", "answer": " pop"}\n')
    with pytest.raises(UsageError, match=r"qac\.jsonl: line 2"):
        read_prompts(directory)


def test_missing_prompts_are_refused_with_an_example(tmp_path):
    with pytest.raises(UsageError, match="nowhere") as none:
        read_prompts(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"<language>\.jsonl") as bare:
        read_prompts(write(tmp_path / "bare"))
    directory = write(tmp_path / "prompts", qac=GOOD, qaa="\n \n")
    with pytest.raises(UsageError, match=r"qab") as missing:
        read_prompts(directory, ["qac", "qab"])
    with pytest.raises(UsageError, match=r"qaa\.jsonl") as empty:
        read_prompts(directory)
    for caught in (none, bare, missing, empty):
        assert EXAMPLE in str(caught.value)


@pytest.mark.parametrize("missing", ["prompts", "control"])
def test_methods_of_prompts_say_what_they_lack(missing):
    given = {"prompts": prompts_of(OF), "control": prompts_of(OF)}
    require_prompts("culnig", **given)
    require_prompts("integrated-gradients", given["prompts"], None)
    with pytest.raises(UsageError, match=r"culnig.*--prompts DIR and --control DIR") as caught:
        require_prompts("culnig", **(given | {missing: None}))
    assert EXAMPLE in str(caught.value)
    with pytest.raises(UsageError, match="--prompts DIR") as caught:
        require_prompts("integrated-gradients", None, given["control"])
    assert EXAMPLE in str(caught.value)
    assert "--control" not in str(caught.value)


def test_an_answer_that_shares_a_token_with_its_prompt_is_read_alone():
    def pairs(text, add_special_tokens=True):
        return {"input_ids": [text[i : i + 2] for i in range(0, len(text), 2)]}

    assert answer_token(pairs, Prompt("ab", "cde")) == (["ab"], "cd")
    assert answer_token(pairs, Prompt("abc", "def")) == (["ab", "c"], "de")
