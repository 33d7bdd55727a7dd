"""Text: corpora, prompts, conversations and their token batches."""
