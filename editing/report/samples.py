"""Text that was written, beside its prompt, each in the direction of its own script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editing.report.markup import Markup, element
from editing.report.writing import marks


@dataclass(frozen=True)
class Sample:
    """A continuation.

    Attributes:
        prompt: that it continues.
        text: that was written.
        language: that it was identified as.
    """

    prompt: str
    text: str
    language: str


def sample_list(source: str, ways: Sequence[tuple[str, Sequence[Sample]]]) -> Markup:
    """Every prompt with what each way writes after it, in the order of the prompts.

    Args:
        source: language of the prompts.
        ways: name -> its samples.
    """
    prompts = list(dict.fromkeys(sample.prompt for _, samples in ways for sample in samples))
    items = []
    for prompt in prompts:
        lines = [
            element(
                "div",
                element("dt", name, " ", element("span", sample.language, class_="tag")),
                element("dd", one_line(sample.text) or "(nothing)", **marks(sample.language)),
            )
            for name, samples in ways
            for sample in samples
            if sample.prompt == prompt
        ]
        asked = element("p", one_line(prompt), class_="prompt", **marks(source))
        items.append(element("li", asked, element("dl", *lines)))
    return element("ol", *items, class_="samples")


def one_line(text: str) -> str:
    """Words one space apart: line ends of a sample say nothing here."""
    return " ".join(text.split())
