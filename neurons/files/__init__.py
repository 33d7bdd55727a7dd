"""Files: Broca's own artifacts, safetensors headers and offsets, digests; no models here."""
