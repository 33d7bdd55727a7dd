"""Groups of a conversation's tokens, compared with the roles of single tokens."""

import pytest
import torch
from conversations import chats_of

from neurons.errors import UsageError
from neurons.text.conversation_batches import TEMPLATE_GROUP, conversation_batches
from neurons.text.conversations import ROLES, Message, RoleTokens, role_tokens


@pytest.fixture(scope="module")
def loaded(chatting):
    return chatting


def test_every_token_but_the_first_is_in_the_group_of_its_role_and_language(loaded, monkeypatch):
    monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 64)
    chats = chats_of(loaded.tokenizer, ("aa", "bb"))
    text = conversation_batches(loaded, chats)
    assert text.groups == ("aa", "aa/header", "bb", "bb/header", TEMPLATE_GROUP)
    assert text.languages == ("aa", "bb")
    count = 0
    for language, batches in text.batches.items():
        for batch in batches:
            for row, line in enumerate(batch.line_numbers.tolist()):
                conversation = chats[language][line]
                assert batch.ids[row][: len(conversation.ids)].tolist() == conversation.ids.tolist()
                assert not batch.counted[row, 0] and not batch.counted[row, len(conversation.ids) :].any()
                for position in range(1, len(conversation.ids)):
                    role = ROLES[conversation.roles[position]]
                    if role in ("user", "answer", "thought"):
                        group = language
                    else:
                        group = f"{language}/header" if role == "header" else TEMPLATE_GROUP
                    assert text.groups[batch.groups[row, position]] == group
                    count += 1
    assert count == text.tokens


def test_an_answer_keeps_the_tokens_that_the_model_wrote(loaded):
    prompt = role_tokens(loaded.tokenizer, [Message("user", "what is a cab?")], answer_follows=True)
    whole = prompt.answered([5, 6, 7])
    assert whole.ids.tolist() == [*prompt.ids.tolist(), 5, 6, 7]
    assert [ROLES[role] for role in whole.roles[-4:]] == ["header", "answer", "answer", "answer"]


def test_a_language_without_a_header_is_refused_by_name(loaded):
    ids = torch.arange(5, 9)
    user = RoleTokens(ids, torch.full_like(ids, ROLES.index("user")))
    with pytest.raises(UsageError, match="aa/header"):
        conversation_batches(loaded, {"aa": [user]})


def test_a_conversation_that_is_longer_than_the_context_is_refused(loaded, monkeypatch):
    ids = torch.full((loaded.model.config.max_position_embeddings + 1,), 5)
    with pytest.raises(UsageError, match=str(len(ids))):
        conversation_batches(loaded, {"aa": [RoleTokens(ids, torch.zeros_like(ids))]})
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 4096)
    ids = torch.full((3000,), 5)
    roles = torch.full_like(ids, ROLES.index("user"))
    roles[-1] = ROLES.index("header")
    (batch,) = conversation_batches(loaded, {"aa": [RoleTokens(ids, roles)]}).batches["aa"]
    assert batch.ids.shape == (1, 3000)
