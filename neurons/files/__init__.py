"""Files: Broca's own artifacts, safetensors headers and offsets, digests; nothing of models."""
