"""One pass over the text: hooks at sites, streaming sums; no activation outlives its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from neurons.anatomy import Anatomy, first, site_module
from neurons.batches import TokenBatch
from neurons.errors import BrocaError
from neurons.source import LoadedModel
from neurons.statistics import Statistics, moment_dtype, parse_moment

Reader = Callable[[torch.Tensor], None]
Progress = Callable[[int], None]


@contextmanager
def reading(anatomy: Anatomy, readers: Mapping[tuple[str, int], Reader]) -> Iterator[None]:
    """Call ``readers[site, layer]`` with that site's values [rows, length, width] at every forward pass."""
    handles = []
    try:
        for (site, layer), reader in readers.items():
            module, is_input = site_module(anatomy, site, layer)
            if is_input:

                def before(_: Any, inputs: Any, reader: Reader = reader) -> None:
                    reader(first(inputs))

                handles.append(module.register_forward_pre_hook(before))
            else:

                def after(_: Any, __: Any, output: Any, reader: Reader = reader) -> None:
                    reader(first(output))

                handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Hidden states [rows, length, d] of a batch; no logits are made."""
    mask = batch.attention.long() if batch.padded else None
    hidden: torch.Tensor = model.base_model(
        input_ids=batch.ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return hidden


def record(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    moments: Sequence[str],
    progress: Progress | None = None,
) -> Statistics:
    """Sum moments of activations over all counted tokens, per language.

    Args:
        loaded: the model.
        batches: language -> its batches.
        moments: what to sum, as ``site:moment``:
            ``mlp_act:positive``   int64, tokens with activation > 0;
            ``SITE:sum``           float64, sum over tokens;
            ``SITE:text_mean``     float64, sum over texts (rows) of the mean over the text's tokens;
            ``mlp_in:attribution`` float64, sum over tokens of |h * dLoss/dh|, where Loss is the sum of
                                   the negative log-likelihoods (nats) of a row's tokens.  Needs a
                                   backward pass.
        progress: called with the number of tokens of each batch that is done.

    Returns:
        Statistics with every moment [layers, width, languages].

    Raises:
        BrocaError: an activation that is not finite, by layer and site.
    """
    anatomy, model, device = loaded.anatomy, loaded.model, loaded.device
    languages = tuple(batches)
    parsed = [parse_moment(moment) for moment in moments]
    sums = {
        f"{site}:{moment}": torch.zeros(
            anatomy.layers, anatomy.width(site), len(languages), dtype=moment_dtype(moment), device=device
        )
        for site, moment in parsed
    }
    tokens = torch.zeros(len(languages), dtype=torch.int64)
    texts = torch.zeros(len(languages), dtype=torch.int64)
    backward = any(moment == "attribution" for _, moment in parsed)
    witness = torch.zeros(anatomy.layers, dtype=torch.float64, device=device)
    current: dict[str, Any] = {}

    def reader_of(site: str, layer: int) -> Reader:
        wanted = [moment for at, moment in parsed if at == site]

        def read(values: torch.Tensor) -> None:
            counted, k = current["counted"], current["k"]
            for moment in wanted:
                total = sums[f"{site}:{moment}"][layer, :, k]
                if moment == "positive":
                    total += ((values > 0) & counted[..., None]).sum((0, 1))
                    # NaN > 0 is False: a count alone would hide it.
                    inside = values.detach().masked_fill(~counted[..., None], 0.0)
                    witness[layer] += inside.sum(dtype=torch.float64)
                elif moment == "sum":
                    total += values.detach()[counted].sum(0, dtype=torch.float64)
                elif moment == "text_mean":
                    inside = values.detach().double().masked_fill(~counted[..., None], 0.0)
                    total += (inside.sum(1) / counted.sum(1)[:, None]).sum(0)
                else:
                    _attribute(values, counted, total)

        return read

    readers = {
        (site, layer): reader_of(site, layer)
        for site in dict.fromkeys(site for site, _ in parsed)
        for layer in range(anatomy.layers)
    }
    with reading(anatomy, readers), torch.set_grad_enabled(backward):
        for k, language in enumerate(languages):
            for batch in batches[language]:
                on_device = batch.to(device)
                current.update(counted=on_device.counted, k=k)
                if backward:
                    loss_sum(model, on_device).backward()
                else:
                    forward(model, on_device)
                tokens[k] += int(batch.counted.sum())
                texts[k] += len(batch.ids)
                if progress is not None:
                    progress(int(batch.counted.sum()))
    for name, total in {**sums, "mlp_act": witness}.items():
        if not bool(torch.isfinite(total).all()):
            layer = int((~torch.isfinite(total)).nonzero()[0, 0])
            raise BrocaError(
                f"{loaded.name}: {name} is not finite in layer {layer}: try --dtype float32 or bfloat16"
            )
    return Statistics(
        languages=languages,
        tokens=tokens,
        texts=texts,
        moments={name: total.cpu() for name, total in sums.items()},
        fingerprint=loaded.fingerprint,
    )


def _attribute(values: torch.Tensor, counted: torch.Tensor, total: torch.Tensor) -> None:
    """Add |h * dLoss/dh| to ``total`` when the backward pass reaches ``values``."""
    if not values.requires_grad:
        # The weights are frozen, so nothing below the first site asks for a gradient.
        values.requires_grad_(True)

    def on_gradient(gradient: torch.Tensor) -> None:
        product = (values.detach() * gradient).abs()
        total.add_(product[counted].sum(0, dtype=torch.float64))

    values.register_hook(on_gradient)


def loss_sum(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Negative log-likelihood (nats) of the counted tokens given those before them, summed."""
    logits = model.get_output_embeddings()(forward(model, batch)[:, :-1])
    wanted = batch.ids[:, 1:].masked_fill(~batch.counted[:, 1:], -100)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=-100, reduction="sum"
    )
