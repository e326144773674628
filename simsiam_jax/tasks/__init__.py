"""Tasks of a configuration, each a module with run(config, workdir), and their parts."""
