"""HTML pages of runs and of what networks see."""
