"""Steering vectors for vLLM-Hook (github.com/IBM/vLLM-Hook, worker ``steer_hook_act``): one vector at one layer.

NAME.pt      {"dir": float32 [d]}, for ``torch.load``
NAME.json    the ``config_file`` of ``HookLLM``: add coefficient * dir to the output of layer ``optimal_layer``
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from editing.directions.control_vectors import SITE, residual_vectors
from editing.directions.direction import Direction
from neurons.errors import UsageError
from neurons.files.artifact import write_atomically


def write_hook_vector(direction: Direction, layer: int, path: Path) -> Path:
    """Write the vector at the output of a layer, with its length as the coefficient 1, and the configuration.

    Args:
        direction: has vectors at ``block_out``.
        layer: the layer, from 0.
        path: of the vector (.pt); the configuration names it as it is given here.

    Returns:
        The path of the configuration.

    Raises:
        UsageError: a direction without vectors at ``block_out``, or without one at this layer.
    """
    vectors = residual_vectors(direction)
    if not 0 <= layer < len(vectors) or not bool(vectors[layer].any()):
        raise UsageError(f"the direction has no vector at {SITE} of layer {layer}: give another layer")
    stream = io.BytesIO()
    torch.save({"dir": vectors[layer].float().clone()}, stream)
    steering = {
        "method": "add_vector",
        "optimal_layer": layer,
        "coefficient": 1.0,
        "vector_path": str(path),
        "apply_at_all_positions": True,
    }
    configuration = path.with_suffix(".json")
    write_atomically(path, stream.getvalue())
    write_atomically(configuration, (json.dumps({"steering": steering}, indent=2) + "\n").encode())
    return configuration
