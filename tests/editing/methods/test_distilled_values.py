"""Distilled values, compared with whole distributions of a model with edited weights, one row at a time."""

import copy

import pytest
import torch
from conversations import chats_of

from editing.methods import distilled_values as distillation
from editing.methods.conversation_keys import conversation_keys
from editing.methods.distilled_values import Example, distilled_values, mean_divergence
from editing.plans.plan import make_plan
from neurons.errors import UsageError
from neurons.text.conversation_batches import conversation_batches, groups_of

EXAMPLES = [
    Example((5, 6, 7 + i), (5, 6, 7 + i, 30, 31, 32), tuple(range(10 + i, 14 + 2 * i))) for i in range(6)
]
OTHERS = [Example((5, 6, 20 + i), (5, 6, 20 + i, 30, 31, 32), (11, 12 + i, 13)) for i in range(3)]


@pytest.fixture(scope="module")
def loaded(chatting):
    return chatting


@pytest.fixture(scope="module")
def keys(loaded):
    text = conversation_batches(loaded, chats_of(loaded.tokenizer, ("aa", "bb"), count=12))
    edits = conversation_keys(loaded, text, [groups_of("aa")], range(loaded.anatomy.layers))
    return make_plan(edits, {"fingerprint": loaded.fingerprint, "settings": {}})


def distributions(model, prompt, answer):
    """Log-probabilities, float64 [answer + 1, V], of the tokens after the prompt and after every token of the answer."""
    ids = torch.tensor([[*prompt, *answer]])
    return model(ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1)


def naive_divergence(loaded, plan, examples, values=None):
    """Mean KL, with the plan in the weights of a copy of the model."""
    edited = copy.deepcopy(loaded.model)
    for index, edit in enumerate(plan.edits):
        down = edited.model.layers[edit.layer].mlp.down_proj
        value = edit.left[:, 0] if values is None else values[index]
        weight = down.weight.detach() + value[:, None] * edit.right[:, 0]
        del down.weight
        down.weight = weight
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            p = distributions(loaded.model, example.teacher, example.answer)
        q = distributions(edited, example.student, example.answer)
        total = total + (p.exp() * (p - q)).sum()
        count += len(p)
    return total / count


def test_the_divergence_is_that_of_whole_distributions(loaded, keys):
    generator = torch.Generator().manual_seed(0)
    edits = [
        copy.copy(edit).__class__(**{**vars(edit), "left": torch.randn(edit.left.shape, generator=generator)})
        for edit in keys.edits
    ]
    plan = make_plan(edits, keys.metadata)
    assert mean_divergence(loaded, EXAMPLES) == pytest.approx(
        float(naive_divergence(loaded, keys, EXAMPLES)), rel=1e-5
    )
    assert mean_divergence(loaded, EXAMPLES, plan) == pytest.approx(
        float(naive_divergence(loaded, plan, EXAMPLES)), rel=1e-4
    )


def test_a_first_step_is_adams_on_the_gradient_of_the_edited_weights(loaded, keys):
    rate = 0.01
    examples = EXAMPLES[:4]  # a single step
    learned = distilled_values(loaded, keys, examples, OTHERS, passes=1, rate=rate)
    sizes = []
    for edit in keys.edits:
        outputs = []
        down = loaded.model.model.layers[edit.layer].mlp.down_proj
        handle = down.register_forward_hook(lambda _, __, output, kept=outputs: kept.append(output[0]))
        with torch.no_grad():
            for example in examples:
                loaded.model(torch.tensor([[*example.student, *example.answer]]))
        handle.remove()
        pairs = zip(examples, outputs, strict=True)
        rows = torch.cat([output[len(example.student) - 1 :] for example, output in pairs])
        sizes.append(float(rows.double().square().mean().sqrt()))
    values = [torch.zeros(loaded.anatomy.residual, requires_grad=True) for _ in keys.edits]
    naive_divergence(loaded, keys, examples, values).backward()
    assert learned.passes == 1
    for edit, value, size in zip(learned.plan.edits, values, sizes, strict=True):
        # Adam's first step is the rate against the gradient's sign.
        expected = -rate * size * value.grad.sign()
        clear = value.grad.abs() > 1e-3 * value.grad.abs().max()
        torch.testing.assert_close(edit.left[:, 0][clear], expected[clear], rtol=1e-3, atol=0)


def test_learning_brings_the_student_to_the_teacher_and_leaves_the_weights(loaded, keys):
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    counts = []
    learned = distilled_values(loaded, keys, EXAMPLES, EXAMPLES, passes=12, rate=0.05, progress=counts.append)
    assert learned.held_out[-1] < 0.7 * learned.held_out[0]
    assert learned.held_out[learned.passes] == min(learned.held_out)
    assert mean_divergence(loaded, EXAMPLES, learned.plan) == pytest.approx(min(learned.held_out), rel=1e-4)
    assert sum(counts) == 12 * sum(len(example.answer) + 1 for example in EXAMPLES)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    again = distilled_values(loaded, keys, EXAMPLES, EXAMPLES, passes=12, rate=0.05)
    assert again.plan.to_bytes() == learned.plan.to_bytes()


def test_recomputed_activations_give_the_same_values(loaded, keys, monkeypatch):
    plain = distilled_values(loaded, keys, EXAMPLES, OTHERS, passes=2, rate=0.02)
    original, forwards = distillation.batches_for, []
    monkeypatch.setattr(
        distillation, "batches_for", lambda *arguments: (original(*arguments)[0], arguments[1])
    )
    first = loaded.model.model.layers[0].mlp.register_forward_hook(lambda *_: forwards.append(1))
    again = distilled_values(loaded, keys, EXAMPLES, OTHERS, passes=2, rate=0.02)
    first.remove()
    for edit, other in zip(plain.plan.edits, again.plan.edits, strict=True):
        assert edit.left.any()
        torch.testing.assert_close(edit.left, other.left, rtol=1e-4, atol=1e-7)
    # Teachers, output sizes, held-out examples three times, and every training pass twice.
    assert len(forwards) > 4 * len(EXAMPLES) // distillation.EXAMPLES_A_STEP + 4


def test_the_pass_is_chosen_on_held_out_examples(loaded, keys):
    """On held-out examples that must not change, the values before the first pass are the best."""
    unchanged = [Example(example.student, example.student, example.answer) for example in EXAMPLES]
    learned = distilled_values(loaded, keys, EXAMPLES, unchanged, passes=2, rate=0.05)
    assert learned.passes == 0 and learned.held_out[0] == pytest.approx(0, abs=1e-6)
    assert not any(edit.left.any() for edit in learned.plan.edits)


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"rate": 0.0}, {"examples": []}, {"held_out": []}])
def test_nothing_to_learn_is_refused(loaded, keys, wrong):
    arguments = {"examples": EXAMPLES, "held_out": OTHERS, **wrong}
    with pytest.raises(UsageError):
        distilled_values(loaded, keys, **arguments)
