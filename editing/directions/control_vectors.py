"""Control vectors in a .gguf file, as llama.cpp, repeng and EasySteer use them.

    general.architecture        "controlvector"
    controlvector.layer_count   number of vectors
    direction.N                 float32 [d], added to the output of layer N

llama.cpp refuses a vector for layer 0.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import torch

from editing.directions.direction import Direction
from neurons.errors import BrocaError, UsageError, first_line
from neurons.files.artifact import write_atomically

ARCHITECTURE = "controlvector"
SITE = "block_out"


def read_control_vectors(path: Path) -> dict[str, torch.Tensor]:
    """``direction.N`` -> float32 [d].

    Raises:
        BrocaError: not a readable file, or one of another architecture.
    """
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else str(field.contents())
        if architecture == ARCHITECTURE:
            return {
                tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
                for tensor in reader.tensors
                if tensor.name.startswith("direction.")
            }
    # The reader raises many types for damaged files.
    except Exception as error:
        raise BrocaError(f"{path}: not a readable .gguf file ({first_line(error)})") from error
    raise BrocaError(
        f"{path}: a .gguf file of architecture {architecture!r}, not {ARCHITECTURE!r}: give a file "
        "with control vectors"
    )


def residual_vectors(direction: Direction) -> torch.Tensor:
    """The vectors at the outputs of the layers, float64 [L, d].

    Raises:
        UsageError: a direction without them.
    """
    if SITE not in direction.vectors:
        raise UsageError(
            f"the direction has no vectors at {SITE}: it has {', '.join(direction.vectors) or 'none'}"
        )
    return direction.vectors[SITE]


def write_control_vectors(direction: Direction, path: Path) -> list[int]:
    """Write the vectors at the outputs of the layers, without layer 0 and layers whose vector is 0.

    Args:
        direction: has vectors at ``block_out``.
        path: the file (.gguf).

    Returns:
        The layers written.

    Raises:
        UsageError: another suffix, or a direction without vectors at ``block_out``.
        BrocaError: every vector is 0.
    """
    if path.suffix != ".gguf":
        raise UsageError(f"{path}: control vectors are written as .gguf: name the file so")
    vectors = residual_vectors(direction)
    layers = [layer for layer in range(1, len(vectors)) if bool(vectors[layer].any())]
    if not layers:
        raise BrocaError(
            f"the direction's vectors at {SITE} are 0 in every layer but the first: make another one"
        )
    with TemporaryDirectory() as directory:
        temporary = Path(directory) / path.name
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(direction.metadata.get("model", "")))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
        writer.add_description(f"{direction.source} to {direction.target}")
        for layer in layers:
            writer.add_tensor(f"direction.{layer}", vectors[layer].float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomically(path, temporary.read_bytes())
    return layers
