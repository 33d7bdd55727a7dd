"""Plans: the change of each module, independent of the architecture; no checkpoint is written here."""
