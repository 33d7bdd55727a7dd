"""Learned values, compared with a hand-written edited model, with finite differences and with a planted continuation."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from editing.directions.diffmean import diffmean_direction
from editing.methods.added_values import adding, values_of
from editing.methods.crossings import crossing_batch, crossings, openings_and_rests
from editing.methods.keyed import keyed_plan
from editing.methods.keyed_search import KeyedSearch
from editing.methods.learned_values import HELD_OUT, LEARNED_AT, _loss, learned_values
from editing.methods.material import Material
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from editing.study.search_space import spaces
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording.text_pass import forward


@pytest.fixture(scope="module")
def plan(llama, corpus):
    direction = diffmean_direction(llama, corpus, "qaa", "qab")
    return keyed_plan(llama, corpus, direction, strength=2.0, blocks=("attn", "mlp"))


@pytest.fixture(scope="module")
def texts(corpus):
    return corpus.texts["qaa"], corpus.texts["qab"]


def joined_rows(loaded, texts, turn=0):
    return crossings(loaded.tokenizer, openings_and_rests(texts[0])[0], openings_and_rests(texts[1])[1], turn)


def naive_loss(model, rows):
    """Sum over rows and tokens after the opening, and their number, one row at a time from the model's logits."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            predicted = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        for position in range(row.crosses, len(row.ids)):
            total -= float(predicted[position - 1, row.ids[position]])
            count += 1
    return total, count


def hooks_of(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def change(edit):
    return edit.left.double() @ edit.right.double().T


def test_openings_and_rests_of_texts(llama):
    texts = ["one two  three four five six seven eight", "too short", ""]
    openings, rests = openings_and_rests(texts)
    assert openings == ["one two three four five six", "too short"]
    assert rests == [" seven eight"]
    first, second = crossings(llama.tokenizer, openings, [" A b", " C"], turn=1)
    for row, opening, rest in ((first, openings[0], " C"), (second, openings[1], " A b")):
        assert row.ids[0] == llama.tokenizer.bos_token_id
        assert llama.tokenizer.decode(row.ids[1 : row.crosses]) == opening
        assert llama.tokenizer.decode(row.ids[row.crosses :]) == rest


def test_a_token_across_the_end_of_the_opening_follows_it():
    class Tokenizer:
        """Makes a token of every two letters."""

        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [[hash(t[i : i + 2]) for i in range(0, len(t), 2)] for t in texts]}

    (row,) = crossings(Tokenizer(), ["abc"], ["defg"], 0)
    assert len(row.ids) == 4 and row.crosses == 1  # ab|cd ef g


def test_rows_are_truncated_and_counted_after_the_opening(llama, texts):
    rows = joined_rows(llama, texts)[:5]
    batch = crossing_batch(rows, 12)
    assert batch.ids.shape == (5, 12)
    for i, row in enumerate(rows):
        kept = list(row.ids[:12])
        assert batch.ids[i, : len(kept)].tolist() == kept
        assert batch.attention[i].tolist() == [p < len(row.ids) for p in range(12)]
        assert batch.counted[i].tolist() == [row.crosses <= p < len(row.ids) for p in range(12)]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_the_loss_is_that_of_the_edited_weights(checkpoint_of, corpus, texts, architecture):
    """Gemma 2 has norms after its modules, GPT-2 transposed weights and biases."""
    loaded = load_model(str(checkpoint_of(architecture)), device="cpu")
    anatomy, generator = loaded.anatomy, torch.Generator().manual_seed(5)
    plan = make_plan(
        [
            ModuleEdit(
                layer,
                block,
                (0,),
                left=0.3 * torch.randn(anatomy.residual, 1, generator=generator),
                right=0.3 * torch.randn(anatomy.width(f"{block}_in"), 1, generator=generator),
            )
            for layer in range(anatomy.layers)
            for block in ("attn", "mlp")
        ],
        {"settings": {}, "fingerprint": loaded.fingerprint},
    )
    rows = joined_rows(loaded, texts)[:4]
    with torch.no_grad(), adding(loaded, plan, values_of(plan).float()):
        loss = float(_loss(loaded, crossing_batch(rows, 512)))
    with applied(loaded, plan):
        total, _ = naive_loss(loaded.model, rows)
    assert loss == pytest.approx(total, rel=1e-4)
    assert loss != pytest.approx(naive_loss(loaded.model, rows)[0], rel=1e-3)


def test_the_gradient_is_that_of_finite_differences(llama, plan, texts):
    batch = crossing_batch(joined_rows(llama, texts)[:4], 512)
    values = values_of(plan).float().requires_grad_(True)
    with torch.enable_grad(), adding(llama, plan, values):
        _loss(llama, batch).backward()
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        step = torch.randn(values.shape, generator=generator)
        step /= step.norm()
        losses = []
        for size in (0.05, -0.05):
            with torch.no_grad(), adding(llama, plan, values + size * step):
                losses.append(float(_loss(llama, batch)))
        slope = (losses[0] - losses[1]) / 0.1
        assert float((values.grad * step).sum()) == pytest.approx(slope, rel=0.03, abs=0.02)


def test_training_improves_held_out_text(llama, plan, texts):
    before = [parameter.clone() for parameter in llama.model.parameters()]
    learned = learned_values(llama, plan, *texts, passes=4)
    learning = learned.metadata["learning"]
    assert all(torch.equal(a, b) for a, b in zip(before, llama.model.parameters(), strict=True))
    held_out_losses, passes = learning["held_out"], learning["passes"]
    assert len(held_out_losses) == 5 and held_out_losses[passes] == min(held_out_losses)
    # The reported losses are those of the edited weights on the held-out lines.
    openings, rests = openings_and_rests(texts[0])[0], openings_and_rests(texts[1])[1]
    held_out = [lines[HELD_OUT - 1 :: HELD_OUT] for lines in (openings, rests)]
    rows = [row for turn in range(4) for row in crossings(llama.tokenizer, *held_out, turn)]
    for edit_plan, expected in ((plan, held_out_losses[0]), (learned, min(held_out_losses))):
        with applied(llama, edit_plan):
            total, count = naive_loss(llama.model, rows)
        assert total / count == pytest.approx(expected, rel=1e-4)
    assert min(held_out_losses) < held_out_losses[0] - 0.05


def test_a_planted_continuation_is_learned(llama, plan, texts):
    """If the same word follows every opening, the edited model predicts it after held-out openings."""
    sources, word = texts[0], " milk"
    expected = llama.tokenizer(word, add_special_tokens=False)["input_ids"][0]
    learned = learned_values(llama, plan, sources, ["a b c d e f" + word * 3] * 20, passes=15, rate=0.1)
    held_out = [
        [llama.tokenizer.bos_token_id, *row.ids[1 : row.crosses]] for row in joined_rows(llama, texts)
    ][HELD_OUT - 1 :: HELD_OUT]

    def hits(edit_plan):
        with applied(llama, edit_plan), torch.no_grad():
            return sum(
                int(llama.model(torch.tensor([row])).logits[0, -1].argmax()) == expected for row in held_out
            )

    assert hits(plan) < 0.2 * len(held_out)
    assert hits(learned) > 0.9 * len(held_out)


def test_keys_and_everything_else_stay(llama, plan, texts):
    learned = learned_values(llama, plan, *texts, passes=1)
    assert learned.metadata["settings"]["learned"]["passes"] == 1
    for edit, other in zip(learned.edits, plan.edits, strict=True):
        assert torch.equal(edit.right, other.right)
        assert (edit.layer, edit.block, edit.components) == (other.layer, other.block, other.components)
        assert edit.left.dtype == torch.float32 and not torch.equal(edit.left, other.left)
        assert edit.notes["change_norm"] == pytest.approx(float(change(edit).norm()))
        assert edit.notes["weight_norm"] == other.notes["weight_norm"]
        assert set(edit.details) == set(other.details)


def test_the_same_input_gives_the_same_bytes(llama, plan, texts):
    first, second = (learned_values(llama, plan, *texts, passes=2) for _ in range(2))
    for edit, other in zip(first.edits, second.edits, strict=True):
        assert torch.equal(edit.left, other.left)
    assert first.metadata == second.metadata
    other = learned_values(llama, plan, *texts, passes=2, seed=1)
    assert not torch.equal(first.edits[0].left, other.edits[0].left)


def test_the_work_does_not_grow_with_the_text(llama, plan, texts, monkeypatch):
    monkeypatch.setattr("editing.methods.learned_values.MAX_LINES", 20)
    short_counts = []
    short = learned_values(
        llama, plan, *(lines[:20] for lines in texts), passes=1, progress=short_counts.append
    )
    openings, rests = (openings_and_rests(lines)[i][:20] for i, lines in enumerate(texts))
    assert len(openings) == 20 == len(rests)
    long_counts = []
    long = learned_values(llama, plan, texts[0] * 50, texts[1] * 50, passes=1, progress=long_counts.append)
    assert len(long_counts) == len(short_counts) == 1
    assert len(long.metadata["learning"]["held_out"]) == len(short.metadata["learning"]["held_out"])
    monkeypatch.setattr("editing.methods.learned_values.MAX_ROW_TOKENS", 26)
    truncated_counts = []
    learned_values(llama, plan, *texts, passes=1, progress=truncated_counts.append)
    assert 0 < truncated_counts[0] < long_counts[0] and truncated_counts[0] <= 16 * 26
    monkeypatch.setattr("editing.methods.learned_values.MAX_ROW_TOKENS", 6)
    with pytest.raises(UsageError, match="6 tokens"):
        learned_values(llama, plan, *texts, passes=1)


def test_memory_for_a_row_at_a_time_changes_little(llama, plan, texts, monkeypatch):
    whole = learned_values(llama, plan, *texts, passes=1)
    monkeypatch.setattr("editing.methods.learned_values.batches_for", lambda *_: (1, False))
    parts = learned_values(llama, plan, *texts, passes=1)
    assert parts.metadata["learning"]["held_out"] == pytest.approx(
        whole.metadata["learning"]["held_out"], rel=1e-4
    )


def test_values_that_no_pass_improves_are_kept(llama, plan, texts, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", partial(torch.optim.Adam, maximize=True))
    learned = learned_values(llama, plan, *texts, passes=2)
    learning = learned.metadata["learning"]
    assert learning["passes"] == 0 and learning["held_out"] == sorted(learning["held_out"])
    assert len({*learning["held_out"]}) == 3
    for edit, other in zip(learned.edits, plan.edits, strict=True):
        torch.testing.assert_close(edit.left, other.left, rtol=1e-6, atol=0)


def test_the_search_learns_once_and_scales(llama, corpus, plan, texts, monkeypatch):
    calls = []

    def counted(*arguments, **settings):
        calls.append(arguments)
        return learned_values(*arguments, **settings, passes=2)

    monkeypatch.setattr("editing.methods.keyed_edit.learned_values", counted)
    material = Material(llama, corpus, "qaa", "qab")
    expected = learned_values(llama, plan, *texts, passes=2)
    space = spaces(material, ["keyed"])["keyed"]
    assert space.knobs["values"].words == ("means", "learned")
    plans = [
        space.make({"values": "learned", "heads": 0.5, "layers": "all", "strength": s})
        for s in (LEARNED_AT, 3.0)
    ]
    assert len(calls) == 1
    for edit, stronger, other in zip(plans[0].edits, plans[1].edits, expected.edits, strict=True):
        torch.testing.assert_close(change(edit), change(other), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(change(stronger), change(edit) * 1.5, rtol=1e-6, atol=1e-9)
    assert "learned" in plans[0].metadata["settings"]
    means = KeyedSearch(heads=0.5, layers=(0, 1)).plan_for(material)
    assert "learned" not in means.metadata["settings"]


def test_the_search_omits_learned_values_that_cannot_be_learned(checkpoint_of, corpus, llama):
    short = replace(corpus, texts={k: texts[:9] for k, texts in corpus.texts.items()})
    space = spaces(Material(llama, short, "qaa", "qab"), ["keyed"])["keyed"]
    assert space.knobs["values"].words == ("means",)
    assert all(settings["values"] == "means" for settings in space.known)
    gemma = load_model(str(checkpoint_of("gemma2")), device="cpu")
    material = Material(gemma, corpus, "qaa", "qab")
    assert spaces(material, ["keyed"])["keyed"].knobs["values"].words == ("means",)
    with pytest.raises(UsageError, match="learned at one strength"):
        KeyedSearch(values="learned", heads=0.5, layers=(0,)).plan_for(material)


def test_refuses(llama, plan, texts):
    with pytest.raises(UsageError, match=r"9 openings.* 10 lines"):
        learned_values(llama, plan, texts[0][:9], texts[1])
    for settings, named in (
        ({"passes": 0}, "0 passes"),
        ({"rate": 0.0}, "rate of 0"),
        ({"rate": math.nan}, "nan"),
    ):
        with pytest.raises(UsageError, match=named):
            learned_values(llama, plan, *texts, **settings)
    (first, *others) = plan.edits
    wide = replace(first, left=first.left.repeat(1, 2), right=first.right.repeat(1, 2))
    with pytest.raises(UsageError, match=r"mlp of layer 0 has rank 1|attn of layer 0 has rank 2"):
        learned_values(llama, make_plan([wide, *others], plan.metadata), *texts)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("fails", "named"),
    [("always", "before training"), ("at first", "before training"), ("later", "learned values")],
)
def test_a_loss_that_is_not_finite_is_refused(llama, plan, texts, monkeypatch, value, fails, named):
    learning = False

    def loss(*arguments):
        nonlocal learning
        learning = learning or torch.is_grad_enabled()
        finite = _loss(*arguments)
        return finite * value if fails == "always" or learning == (fails == "later") else finite

    monkeypatch.setattr("editing.methods.learned_values._loss", loss)
    with pytest.raises(BrocaError, match=named):
        learned_values(llama, plan, *texts, passes=2)


def test_an_interrupted_loss_leaves_no_hook(llama, plan, texts, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("neurons.models.next_token.logits", stopped)
    before = hooks_of(llama.model)
    with pytest.raises(KeyboardInterrupt):
        learned_values(llama, plan, *texts)
    batch = crossing_batch(joined_rows(llama, texts)[:1], 512)
    with torch.no_grad():
        plain = llama.model.base_model(input_ids=batch.ids).last_hidden_state
    assert torch.equal(forward(llama.model, batch), plain)
    assert hooks_of(llama.model) == before
