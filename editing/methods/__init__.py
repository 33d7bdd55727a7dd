"""Methods: from neurons, directions and text to a plan of weight edits, one method in each file."""
