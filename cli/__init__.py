"""The command ``broca``: parses, calls, prints."""
