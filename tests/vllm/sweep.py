"""Which families vLLM serves on a CPU: tries every model type that Broca supports, on tiny random models.

Of each type a base model and an export with every module edited are loaded in vLLM: greedy tokens and their
log-probabilities must be those of transformers.  Where vLLM serves none, its own message is kept.  The results are
kept in WORK/families.json; types in it are not tried again.  --table writes the table of docs/architectures.md.

    PYTHONPATH=.:benchmarks python tests/vllm/sweep.py --vllm .venv-vllm/bin/python --table docs/architectures.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from compare import first_difference
from families import make_base, plan_of_all
from reference import NEW_TOKENS, PROMPTS, answers

from editing.checkpoints.export import export
from neurons.errors import first_line
from neurons.models.source import open_model

HERE = Path(__file__).parent
LIMIT_SECONDS = 600
AT_A_TIME = 8  # types a start of vLLM
SERVED, DIFFERS, REFUSED, NO_MODEL = "served", "other answers", "not served", "no tiny model"
ENVIRONMENT = {
    "BASES": "all",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass(frozen=True)
class Result:
    """What came of one model type: its kind, and why where it is not SERVED."""

    model_type: str
    kind: str
    why: str = ""


def supported(page: Path) -> list[str]:
    """The model types in the first table of docs/architectures.md."""
    table = page.read_text(encoding="utf-8").split("<!-- generated -->")[1].split("\n\n")[1]
    return re.findall(r"^\| (?!model type|---)(\S+) \|", table, re.MULTILINE)


def make(model_type: str, folder: Path) -> None:
    """A base model, its export and transformers' answers, in a process of its own; or why there are none."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    base, exported = folder / "base", folder / "mixed-exported"
    try:
        make_base(model_type, transformers.AutoTokenizer.from_pretrained("artifacts/demo/model"), base)
        source = open_model(str(base))
        export(source, plan_of_all(source), exported)
        expected = {str(path): answers(path) for path in (base, exported)}
        (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    # Anything may go wrong in transformers with a size that it does not expect.
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {first_line(error)} ({Path(where.filename).name}:{where.lineno})"
        (folder / "why.txt").write_text(why, encoding="utf-8")


def made(model_type: str, work: Path) -> Path:
    folder = work / model_type
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    process = multiprocessing.get_context("fork").Process(target=make, args=(model_type, folder))
    process.start()
    process.join(LIMIT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        (folder / "why.txt").write_text(f"no answer in {LIMIT_SECONDS} s", encoding="utf-8")
    return folder


def tried(types: Sequence[str], work: Path, vllm: str) -> list[Result]:
    """The results of some types, with one start of vLLM."""
    folders = {name: made(name, work) for name in types}
    expected: dict[str, Any] = {}
    cases = {}
    for name, folder in folders.items():
        if (folder / "expected.json").exists():
            expected |= json.loads((folder / "expected.json").read_text(encoding="utf-8"))
            exported = [str(folder / "mixed-exported")]
            cases[name] = {"base": str(folder / "base"), "exported": exported, "adapters": []}
    reference = work / "reference.json"
    reference.write_text(json.dumps({"new_tokens": NEW_TOKENS, "prompts": PROMPTS, "cases": cases}))
    shutil.rmtree(work / "answers", ignore_errors=True)  # of the types before
    command = [vllm, str(HERE / "generate.py"), "--reference", str(reference), "--out", str(work / "answers")]
    subprocess.run([*command, "--at-once", "1"], env=os.environ | ENVIRONMENT, check=True)
    found = json.loads((work / "answers" / "answers.json").read_text(encoding="utf-8"))
    results = []
    for name, folder in folders.items():
        if name not in cases:
            why = (folder / "why.txt").read_text() if (folder / "why.txt").exists() else "its process died"
            results.append(Result(name, NO_MODEL, why))
        else:
            results.append(_result(name, folder, found, expected))
        shutil.rmtree(folder)
    return results


def _result(name: str, folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> Result:
    for path in (str(folder / "base"), str(folder / "mixed-exported")):
        if isinstance(found[path], str):
            return Result(name, REFUSED, message(found[path]))
        if why := first_difference(found[path], expected[path]):
            return Result(name, DIFFERS, f"{Path(path).name}: {why}")
    return Result(name, SERVED)


def message(log: str) -> str:
    """The last error in vLLM's log, in one line."""
    # Without the time and place at the head of each line, and pydantic's count of errors.
    plain = re.sub(r"(?m)^.*?\.py:\d+\] |(?<=: )1 validation error for \w+\n  ", "", log)
    said = re.findall(r"(?m)^((?:\w+\.)*\w*(?:Error|Exception)\b.*)", plain)
    if not said:
        return " ".join(plain.split())[-200:]
    # What it could not import is said before that it could not inspect the class.
    cause = [line for line in said if "ModuleNotFoundError" in line] if "to be inspected" in said[-1] else []
    line = (cause or said)[-1].replace("pydantic_core._pydantic_core.ValidationError: Value error, ", "")
    line = re.sub(
        r" \[type=.*| Supported architectures: .*| This could be because .*| If you were .*", "", line
    )
    line = re.sub(r"/\S+/([\w-]+/(?:base|mixed-exported))", r"\1", line)
    if re.fullmatch(r"[\w.]+", line) and (places := re.findall(r'File "\S*?(\w+\.py)", line (\d+)', plain)):
        line = f"{line} ({':'.join(places[-1])})"  # an assertion without words
    return line.strip()


def table_of(results: Sequence[Result], version: str) -> str:
    """Markdown: the types that are served, then the others with the reason."""
    served = [result.model_type for result in results if result.kind == SERVED]
    others = [result for result in results if result.kind != SERVED]
    rows = [f"| {one.model_type} | {one.kind} | {one.why.replace('|', chr(92) + '|')} |" for one in others]
    return "\n".join(
        [
            f"{len(results)} model types in vLLM {version} on a CPU: {len(served)} served with the answers of "
            f"transformers, {len(others)} not.",
            "",
            f"Served: {', '.join(served)}.",
            "",
            "| model type | outcome | vLLM's message, or what differs |",
            "| --- | --- | --- |",
            *rows,
        ]
    )


def write_table(results: Sequence[Result], version: str, page: Path) -> None:
    """Replace what is between the page's two marks."""
    begin, end = "<!-- generated: vLLM -->", "<!-- end: vLLM -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{table_of(results, version)}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the Python of the environment with vLLM")
    parser.add_argument("--types", help="separated by commas; default: all that docs/architectures.md names")
    parser.add_argument("--work", type=Path, default=Path("build/vllm"), help="default: build/vllm")
    parser.add_argument("--table", type=Path, help="Markdown page whose table is replaced")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / "families.json"
    results = {}
    if kept.exists():
        results = {row["model_type"]: Result(**row) for row in json.loads(kept.read_text(encoding="utf-8"))}
    types = arguments.types.split(",") if arguments.types else supported(Path("docs/architectures.md"))
    missing = [name for name in types if name not in results]
    for start in range(0, len(missing), AT_A_TIME):
        for result in tried(missing[start : start + AT_A_TIME], arguments.work.resolve(), arguments.vllm):
            results[result.model_type] = result
            print(f"{result.model_type:24} {result.kind}  {result.why}", flush=True)
        rows = [asdict(results[name]) for name in sorted(results)]
        kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if arguments.table is not None:
        asked = "from importlib.metadata import version; print(version('vllm-cpu'))"
        version = subprocess.run([arguments.vllm, "-c", asked], capture_output=True, text=True, check=True)
        write_table([results[name] for name in sorted(results)], version.stdout.strip(), arguments.table)


if __name__ == "__main__":
    main()
