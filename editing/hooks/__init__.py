"""Hooks: ways of steering while the model runs, which edits are compared with; frozen, and called they give a context that steers."""
