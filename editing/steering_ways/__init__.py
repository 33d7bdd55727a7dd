"""Ways of steering while the model runs, one a file: frozen, and called they give a context that steers."""
