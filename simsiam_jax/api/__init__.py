"""The Python interface; its names are those of the package `simsiam_jax`."""
