"""Statistics: sums over tokens and texts, and their file; no model runs here."""
