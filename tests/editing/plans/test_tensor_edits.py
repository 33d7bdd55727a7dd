"""The changes of a plan to stored tensors, a few rows at a time."""

import pytest
import torch

from editing.plans.plan import ModuleEdit, make_plan
from editing.plans.tensor_edits import tensor_edits
from neurons.files.tensor_files import read_tensor
from neurons.models.source import open_model


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_chunks_are_the_rows_of_the_whole_tensor(checkpoint_of, family):
    """GPT-2 stores its weights transposed, the mixtures have one tensor for all experts."""
    source = open_model(str(checkpoint_of(family)))
    d, n = source.anatomy.residual, source.anatomy.neurons
    edit = ModuleEdit(
        1,
        "mlp",
        (0,),
        row_scale=1 + 0.1 * random(d, seed=0),
        column_scale=1 + 0.1 * random(n, seed=1),
        left=random(d, 2, seed=2),
        right=random(n, 2, seed=3),
    )
    for one in tensor_edits(source, make_plan([edit], {})):
        stored = read_tensor(one.entry)
        parts = [(first, stored[first : first + 3]) for first in range(0, len(stored), 3)]
        for change in (lambda rows, first, one=one: one.rounded(rows, first).stored, one.restored):
            found = torch.cat([change(rows, first) for first, rows in parts])
            assert torch.equal(found, change(stored, 0))
