"""Statistics: what is summed over tokens and texts, and the file that keeps it; no model is run here."""
