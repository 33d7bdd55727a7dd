"""Study: methods side by side, chosen on one part of the text and reported on another; the search for settings."""
