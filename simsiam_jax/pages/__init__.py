"""HTML pages of runs and embeddings."""
