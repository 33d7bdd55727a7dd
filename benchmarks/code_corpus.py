"""Write a corpus of Python and JavaScript with prompts, for ``broca identify`` and ``broca ablate --prompts``.

    python benchmarks/code_corpus.py /usr/lib/node_modules/npm code

Python is the standard library of the running interpreter, JavaScript npm and its dependencies (github.com/npm/cli), which
are installed with Node.js.  A text is 24 lines from the middle of a file.  Prompts are 5 lines of other files; the
answer is the indentation and the first word of the next line.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from pathlib import Path

LINES, TEXTS, PROMPTS = 24, 120, 16
ASKED_LINES = 6
FIRST_WORD = re.compile(r"\s*\w+")


def pieces(directory: Path, suffix: str) -> list[list[str]]:
    """The middle lines of every long file, shortest path first, whose last line begins with a word."""
    found = []
    for path in sorted(directory.rglob(f"*{suffix}"), key=lambda path: (len(path.parts), path.as_posix())):
        if {"test", "tests", "site-packages", "idlelib"} & set(path.parts):
            continue
        lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
        first = len(lines) // 2
        last = next((i for i in range(first + LINES, len(lines)) if FIRST_WORD.match(lines[i])), None)
        if last is not None:
            found.append(lines[last - LINES + 1 : last + 1])
    return found


def main(javascript: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    prompts = []
    sources = {"javascript": (javascript, ".js"), "python": (Path(sysconfig.get_path("stdlib")), ".py")}
    for label, (directory, suffix) in sources.items():
        found = pieces(directory, suffix)
        texts, asked = found[:TEXTS], found[TEXTS : TEXTS + PROMPTS]
        if len(asked) < PROMPTS:
            raise SystemExit(f"{directory}: {len(found)} long files are too few")
        rows = [json.dumps({"text": "\n".join(lines)}) for lines in texts]
        (out / f"{label}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
        for *before, last in (lines[-ASKED_LINES:] for lines in asked):
            word = FIRST_WORD.match(last)
            assert word is not None
            prompts.append({"prompt": "\n".join(before) + "\n", "answer": word.group(), "label": label})
    rows = [json.dumps(prompt) for prompt in prompts]
    out.with_name(f"{out.name}-prompts.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
