"""A recording keeps no tensor of a finished batch: memory does not grow with the text."""

import gc
import weakref

import models
import pytest
import torch

from neurons.models.source import load_model
from neurons.recording.record import record
from neurons.text.batches import text_batches

MOMENTS = {
    "counts": ["mlp_act:positive", "mlp_in:sum", "mlp_in:square", "mlp_in:absolute", "mlp_up:positive"],
    "texts": ["mlp_in:text_mean", "mlp_in:text_square", "mlp_in:text_absolute", "mlp_up:worst_rank"],
    "residual": ["attn_in:sum", "attn_out:sum", "mlp_out:sum", "block_out:sum"],
    "gradients": ["mlp_in:attribution"],
    "all": ["mlp_act:positive", "mlp_in:attribution", "mlp_in:worst_rank", "mlp_in:text_mean"],
}


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the storages that were allocated and are not freed."""

    def __init__(self):
        super().__init__()
        self.held = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                self.held[key] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, key, None)
        return out


def held_after(loaded, moments, batches):
    """Bytes of tensors that the recording holds at the end of each batch."""
    at_end = []
    gc.collect()
    gc.disable()
    try:
        with Watch() as watch:
            record(loaded, batches, moments, progress=lambda _: at_end.append(sum(watch.held.values())))
    finally:
        gc.enable()
    return at_end


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3_moe", "gpt_oss"])
def loaded(request, checkpoint_of):
    return load_model(str(checkpoint_of(request.param)), device="cpu")


@pytest.mark.parametrize("name", MOMENTS)
def test_nothing_of_a_batch_is_left(loaded, name):
    texts = models.sentences("qaa", 4, words=(6, 6))
    rows = text_batches(texts, loaded.tokenizer, 64)
    at_end = held_after(loaded, MOMENTS[name], {"qaa": rows * 12, "qab": rows})
    # Sums arise with the first batch; from the second on nothing may be added.
    assert max(at_end[1:12]) <= at_end[1]
