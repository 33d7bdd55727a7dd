"""Plans: what changes in which module, in architecture-neutral terms; nothing is written to a checkpoint here."""
