"""Measure the demo model for its card: bits per byte, and whether it stays in the prompt's language.

    python artifacts/demo/measure.py artifacts/demo/model --text DIR

``--text`` is a directory of held-out ``<language>.txt``; the card's figures are on NTREX-128.
Prints the card's table.  Continuations: the first six words of 50 lines a language, 40 new tokens,
temperature 0.7; identified by py3langid among the model's languages and "other".
"""

from __future__ import annotations

import math
from pathlib import Path

import click

from editing.evaluation.generation import generate
from editing.evaluation.language_id import identify_language
from editing.evaluation.likelihood import mean_nll
from neurons.models.source import load_model
from neurons.text.batches import language_batches
from neurons.text.corpus import read_corpus
from neurons.text.words import distinct_rate, opening

PROMPTS = 50


@click.command()
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), required=True)
@click.option("--languages", default="en,de,fr,es,zh,ar")
@click.option("--seed", type=int, default=0)
def main(model: str, text: Path, languages: str, seed: int) -> None:
    """Print the table of the model card."""
    loaded = load_model(model)
    corpus = read_corpus(text, languages.split(","))
    batches = language_batches(loaded, corpus)
    print("| language | bits per byte | nats a token | own language | distinct words |")
    print("|---|---|---|---|---|")
    shares = []
    for language in corpus.languages:
        nll = mean_nll(loaded, batches[language])
        tokens = sum(int(batch.counted[:, 1:].sum()) for batch in batches[language])
        # Texts longer than the context are cut, so bytes are counted from the tokens that were read.
        size = sum(
            len(loaded.tokenizer.decode(row[kept].tolist()).encode())
            for batch in batches[language]
            for row, kept in zip(batch.ids, batch.counted, strict=True)
        )
        prompts = [opening(line) for line in corpus.non_empty(language)[:PROMPTS]]
        answers = [item.text for item in generate(loaded, prompts, seed=seed)]
        own = [identify_language(answer, corpus.languages) for answer in answers].count(language)
        shares.append(own / len(answers))
        distinct = sum(map(distinct_rate, answers)) / len(answers)
        print(
            f"| {language} | {nll * tokens / size / math.log(2):.3f} | {nll:.3f} | {shares[-1]:.2f} | "
            f"{distinct:.2f} |"
        )
    print(f"\nown language over all: {sum(shares) / len(shares):.3f}")


if __name__ == "__main__":
    main()
