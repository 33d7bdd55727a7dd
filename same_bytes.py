"""Digests of what the commands leave on the demo model, to be compared before and after the move into rooms.

    python same_bytes.py > digests.txt

Removed in the next commit.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

MODEL, CORPUS = "artifacts/demo/model", "artifacts/demo/corpus"
TEXT = ["--corpus", CORPUS, "--part", "estimate", "--tokens", "2000"]


def commands(out):
    d, n, s = (str(out / f"{name}.safetensors") for name in ("direction", "neurons", "statistics"))
    yield ["identify", MODEL, *TEXT, "--out", n]
    yield ["record", MODEL, *TEXT, "--for", "all", "--out", s]
    for method in ("lape", "gradient", "momentum", "clas"):
        yield ["identify", "--statistics", s, "--method", method, "--out", str(out / f"{method}.safetensors")]
    yield ["direction", MODEL, *TEXT, "--source", "en", "--target", "fr", "--out", d]
    edits = {
        "keyed": ["--direction", d, *TEXT],
        "learned": ["--direction", d, *TEXT, "--set", "learn=yes"],
        "steer2edit": ["--direction", d],
        "ablate": ["--direction", d],
        "ablate-subspace": ["--direction", d],
        "bake": ["--direction", d, *TEXT, "--layers", "2"],
        "scale": ["--neurons", n, "--languages", "en", "--set", "factor=0"],
        "language-arithmetic": ["--neurons", n, *TEXT, "--set", "target=fr", "--set", "deactivate=en"],
    }
    for name, options in edits.items():
        method = "keyed" if name == "learned" else name
        yield ["edit", MODEL, "--method", method, *options, "--out", str(out / f"edit-{name}.safetensors")]
        yield ["export", MODEL, "--edit", str(out / f"edit-{name}.safetensors"), "--out", str(out / name)]


def main():
    out = Path("same-bytes-out")
    for command in commands(out):
        subprocess.run([sys.executable, "-m", "cli.main", *command], check=True, stdout=subprocess.DEVNULL)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(out))


if __name__ == "__main__":
    main()
