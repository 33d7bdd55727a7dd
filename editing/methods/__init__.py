"""Methods: what was found to a plan of weight edits, a method a file."""
