"""Keys on conversations, compared with sums in float64 over single tokens."""

import pytest
import torch
from conversations import chats_of

from editing.methods.conversation_keys import coefficients, conversation_keys, middle_layers
from neurons.recording.covariance import each_moments
from neurons.text.conversation_batches import conversation_batches, groups_of
from neurons.text.conversations import ROLES

EPS = 0.01


@pytest.fixture(scope="module")
def loaded(chatting):
    return chatting


@pytest.fixture(scope="module")
def chats(loaded):
    return chats_of(loaded.tokenizer, ("aa", "bb", "cc"), count=12)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 200)


def neurons_by_group(loaded, chats, layer):
    """Group -> the down_proj inputs of its tokens, float64, recorded one conversation at a time."""
    rows_of = {}
    for language, of_language in chats.items():
        for chat in of_language:
            kept = []
            down = loaded.model.model.layers[layer].mlp.down_proj
            handle = down.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0][0]))
            with torch.no_grad():
                loaded.model(chat.ids[None])
            handle.remove()
            for position, row in enumerate(kept[0].double()):
                role = ROLES[chat.roles[position]]
                if position == 0:
                    group = "start"
                elif role in ("user", "answer"):
                    group = language
                else:
                    group = f"{language}/header" if role == "header" else "template"
                rows_of.setdefault(group, []).append(row)
    return {group: torch.stack(rows) for group, rows in rows_of.items()}


def test_moments_are_those_of_the_groups(loaded, chats):
    text = conversation_batches(loaded, chats)
    units = {("mlp_in", 1): torch.arange(loaded.anatomy.neurons)}
    ((_, moments),) = each_moments(loaded, text.batches, units, groups=text.groups)
    rows = neurons_by_group(loaded, chats, 1)
    start = rows.pop("start")
    assert set(moments.languages) == set(rows)
    for index, group in enumerate(moments.languages):
        torch.testing.assert_close(moments.mean[:, index], rows[group].mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.start, start.mean(0), rtol=1e-5, atol=1e-6)
    centred = [of_group - of_group.mean(0) for of_group in rows.values()]
    expected = sum(of_group.T @ of_group for of_group in centred) / sum(map(len, centred))
    torch.testing.assert_close(moments.covariance, expected, rtol=1e-4, atol=1e-7)


def test_a_key_is_the_closed_form_on_the_groups(loaded, chats):
    text = conversation_batches(loaded, chats)
    edits = conversation_keys(loaded, text, [groups_of("bb")], [0, 1], EPS)
    assert [(edit.layer, edit.block) for edit in edits] == [(0, "mlp"), (1, "mlp")]
    for edit in edits:
        rows = neurons_by_group(loaded, chats, edit.layer)
        names = list(rows)
        means = torch.stack([rows[name].mean(0) for name in names], dim=1)
        counted = [name for name in names if name != "start"]
        within = sum(((rows[g] - rows[g].mean(0)).T @ (rows[g] - rows[g].mean(0))) for g in counted)
        form = within / sum(len(rows[g]) for g in counted)
        form += EPS * form.diagonal().mean() * torch.eye(len(form), dtype=torch.float64)
        targets = torch.tensor([float(name.startswith("bb")) for name in names], dtype=torch.float64)
        solved = torch.linalg.solve(form, means)
        expected = solved @ torch.linalg.solve(means.T @ solved, targets)
        torch.testing.assert_close(edit.right[:, 0].double(), expected, rtol=1e-3, atol=1e-4)
        assert not edit.left.any()


def test_coefficients_on_other_conversations(loaded, chats):
    edits = conversation_keys(loaded, conversation_batches(loaded, chats), [["aa"], ["bb", "cc/header"]], [1])
    others = chats_of(loaded.tokenizer, ("aa", "bb", "cc"), count=5)
    result = coefficients(loaded, edits, conversation_batches(loaded, others))[1, "mlp"]
    rows = neurons_by_group(loaded, others, 1)
    rows.pop("start")
    right = edits[0].right.double()
    for group, means in result["means"].items():
        expected = (rows[group] @ right).mean(0)
        torch.testing.assert_close(torch.tensor(means).double(), expected, rtol=1e-4, atol=1e-5)
    squares = sum(((of_group - of_group.mean(0)) @ right).square().sum(0) for of_group in rows.values())
    count = sum(map(len, rows.values()))
    assert result["deviation"] == pytest.approx(float((squares / count).max().sqrt()), rel=1e-4)


def test_several_keys_are_each_as_if_alone(loaded, chats):
    text = conversation_batches(loaded, chats)
    groups = (("aa", "bb"), ("aa/header", "bb/header"))
    (both,) = conversation_keys(loaded, text, groups, [1], EPS)
    assert both.rank == 2 and not both.left.any()
    for column, of_key in enumerate(groups):
        (alone,) = conversation_keys(loaded, text, [of_key], [1], EPS)
        torch.testing.assert_close(both.right[:, column], alone.right[:, 0], rtol=1e-5, atol=1e-7)
        assert both.notes["spread"] >= alone.notes["spread"] * (1 - 1e-6)


@pytest.mark.parametrize("layers, first, last", [(24, 2, 20), (6, 0, 5), (1, 0, 0), (32, 2, 27), (80, 6, 69)])
def test_middle_layers(layers, first, last):
    assert middle_layers(layers) == tuple(range(first, last + 1))
