"""Study: methods compared, with settings chosen on one part of the text and reported on another; settings searched."""
