"""Text: corpora, prompts and the batches of tokens that are made of them."""
