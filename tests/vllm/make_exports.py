"""Base models, plans, and the checkpoints and adapters exported from them, for vLLM; run in the main environment.

OUT/<name>/base, OUT/<name>/<plan>-exported and, of some, OUT/<name>/<plan>-adapter, which must equal the
checkpoint of the same plan; OUT/cases.json lists them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from families import make_base, plan_of_all, rank_one_plan
from served import SERVED

from editing.checkpoints.adapter import export_adapter
from editing.checkpoints.export import export
from editing.directions.diffmean import diffmean_direction
from editing.methods.keyed import keyed_plan
from editing.plans.plan import Plan, make_plan
from neurons.models.source import load_model, open_model
from neurons.text.corpus import read_corpus

SOURCE, TARGET = "en", "fr"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def demo_plan(model: Path, corpus: Path) -> Plan:
    """The keyed edit from English to French, of rank 1 in every layer."""
    loaded = load_model(str(model), device="cpu")
    # The smallest part: this is about loading, not about the edit.
    text = read_corpus(corpus, part="report")
    return keyed_plan(loaded, text, diffmean_direction(loaded, text, SOURCE, TARGET))


def with_scales(plan: Plan, width: int, fingerprint: str) -> Plan:
    """The plan with some neurons of two layers scaled as well, for the model of that fingerprint."""
    column_scale = torch.ones(width)
    column_scale[::40] = 0.5
    edits = [
        replace(edit, column_scale=column_scale) if edit.layer in (2, 5) else edit for edit in plan.edits
    ]
    return make_plan(edits, {**plan.metadata, "fingerprint": fingerprint})


def write(case: dict[str, Any], plan_name: str, plan: Plan, adapter: bool) -> None:
    """The checkpoint of a plan and, where wanted, its adapter."""
    base = Path(case["base"])
    source = open_model(str(base))
    checkpoint = base.parent / f"{plan_name}-exported"
    export(source, plan, checkpoint)
    case["exported"].append(str(checkpoint))
    if adapter:
        found = export_adapter(source, plan, base.parent / f"{plan_name}-adapter")
        case["adapters"].append(
            {"path": str(found.path), "checkpoint": str(checkpoint), "rank": found.served_rank}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--exported", type=Path, help="test only this checkpoint, made from --model")
    parser.add_argument("--real", type=Path, help="test what `make test-real` left there too")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases = {}

    def case(name: str, base: Path) -> dict[str, Any]:
        cases[name] = {"base": str(base), "exported": [], "adapters": []}
        return cases[name]

    if arguments.exported is not None:
        case("own", arguments.model)["exported"].append(str(arguments.exported))
    else:
        base, wide = (arguments.out / name / "base" for name in ("demo", "demo-float32"))
        shutil.copytree(arguments.model, base)
        # In float32: a bfloat16 checkpoint holds the edited weights rounded, an adapter beside it does not.
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(wide)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.save_pretrained(wide)
        plan = demo_plan(wide, arguments.corpus)
        write(case("demo-float32", wide), "rank-1", plan, adapter=True)
        if arguments.real is None:  # else the locked checkpoint answers chats
            chat = arguments.out / "chat" / "base"
            shutil.copytree(wide, chat)
            tokenizer.chat_template = CHAT_TEMPLATE
            tokenizer.save_pretrained(chat)
            tokenizer.chat_template = None
            write(case("chat", chat), "locked", plan, adapter=False)
        source = open_model(str(base))
        mixed = with_scales(plan, source.anatomy.neurons, source.fingerprint)
        write(case("demo", base), "mixed", mixed, adapter=False)
        for name in SERVED:
            directory = arguments.out / name / "base"
            make_base(name, tokenizer, directory)
            source = open_model(str(directory))
            made = case(name, directory)
            write(made, "mixed", plan_of_all(source), adapter=name == "llama")
            if name == "llama":
                write(made, "rank-1", rank_one_plan(source), adapter=True)
        if arguments.real is not None:
            made = case("smollm2", arguments.real / "model")
            made["exported"] += [str(arguments.real / "made" / name) for name in ("steered", "locked")]
    (arguments.out / "cases.json").write_text(json.dumps(cases, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
