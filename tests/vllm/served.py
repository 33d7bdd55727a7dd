"""The model types whose exports vLLM must serve on a CPU: those of the table that sweep.py writes."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/architectures.md"
(_LIST,) = re.findall(r"^Served: (.*)\.$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
# Of bloom the export is within the tolerance, the base is not.
SERVED = tuple(sorted({*_LIST.split(", "), "bloom"}))
