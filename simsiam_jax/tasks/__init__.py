"""What a user runs: each module has run(config, workdir)."""
