"""Pipeline: the job of a recipe, the language lock, and the memory that their stages need."""
