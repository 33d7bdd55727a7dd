"""Hidden states in a file: every move writes what has changed, and nothing is taken for what it is not."""

import pytest
import torch

from neurons.recording import waiting_states
from neurons.recording.waiting_states import WaitingStates


@pytest.fixture
def waiting(monkeypatch):
    monkeypatch.setattr(waiting_states, "MIN_BYTES", 1)
    states = WaitingStates(frozenset())
    yield states
    states.close()


def test_a_tensor_at_the_place_of_a_freed_one_is_another_tensor(waiting):
    """Python and torch reuse addresses at once: the new tensor has the old one's address, size and version."""
    for number in range(50):
        tensor = torch.full((64,), float(number))
        waiting.move([tensor])
        assert tensor.untyped_storage().nbytes() == 0
        waiting.restore()
        assert bool((tensor == number).all())
        del tensor


def test_a_tensor_that_changed_in_place_is_written_again(waiting):
    kept, view = torch.zeros(64), torch.arange(64.0)
    for number in range(5):
        waiting.move([kept, view[10:]])
        waiting.restore()
        assert bool((kept == number).all()) and bool((view == torch.arange(64.0) * 2**number).all())
        kept += 1
        view[:] = view * 2


def test_a_tensor_that_did_not_change_is_written_once(waiting, monkeypatch):
    written = []
    transfer = waiting_states._transfer

    def counted(storage, some):
        written.append(some.__name__)
        transfer(storage, some)

    monkeypatch.setattr(waiting_states, "_transfer", counted)
    kept = torch.ones(64)
    for _ in range(4):
        hidden = torch.rand(64)
        waiting.move([kept, hidden])
        waiting.restore()
    assert written.count("write") == 5 and written.count("readinto") == 8
