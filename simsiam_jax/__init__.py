"""SimSiam self-supervised pre-training in JAX and Flax."""

from simsiam_jax._version import __version__
from simsiam_jax.checkpoints.encoder import load_encoder

__all__ = ['__version__', 'load_encoder']
