"""SimSiam self-supervised pre-training in JAX and Flax."""

from simsiam_jax.checkpoints.encoder import load_encoder

__all__ = ['load_encoder']
