"""Converts weights, and compares the networks of JAX and PyTorch before writing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from simsiam_jax import errors
from simsiam_jax.checkpoints import weight_files
from simsiam_jax.checkpoints.weights import Weights, open_weights, part
from simsiam_jax.models import backbones, pytorch, pytorch_heads
from simsiam_jax.tools.convert import formats, torch_forward

# Largest difference of outputs, relative to their scale.
LIMIT = 1e-4


def jax_outputs(weights: Weights, images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns feature, and z and p if there are heads, in float32 on any device.

    Args:
      weights: Weights of the network.
      images: Normalized images [B, H, W, C].
    """
    modules: list[tuple[str, str, nn.Module]] = [
        ('feature', 'backbone', backbones.from_config(weights.config, dtype='float32'))
    ]
    if {'projector', 'predictor'} <= set(weights.params):
        for name, head in (('z', 'projector'), ('p', 'predictor')):
            modules.append((name, head, pytorch_heads.mlp_of(part(weights, head))))
    outputs, x = {}, jnp.asarray(images)
    with jax.default_matmul_precision('highest'):  # float32 on TPUs and GPUs too
        for name, key, module in modules:
            outputs[name] = x = jax.jit(module.apply, static_argnums=2)(
                part(weights, key), x, False
            )
    return {name: np.asarray(x) for name, x in outputs.items()}


def difference(weights: Weights, sides: list[dict[str, pytorch.Arrays]]) -> float | None:
    """Returns the largest difference of an output between JAX and PyTorch; None without PyTorch.

    A difference is relative to the scale of the output, its root mean square over two random
    images.

    Args:
      weights: Weights for JAX.
      sides: Weights for PyTorch, as read and as they will be written.
    """
    torch = weight_files.load_torch()
    if torch is None:
        return None
    size, channels = weights.config['augment']['size'], weights.config['data']['channels']
    shape = (2, size, size, channels)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    ours = jax_outputs(weights, images)
    heads = backbones.attention_heads(weights.config)
    largest = 0.0
    for parts in sides:
        for name, theirs in torch_forward.outputs(torch, parts, images, heads).items():
            scale = np.sqrt(np.mean(np.square(theirs, dtype=np.float64))) or 1.0
            # max() would ignore NaN
            largest = np.maximum(largest, np.max(np.abs(ours[name] - theirs)) / scale)
    return float(largest)


def convert(source: str, target: str, format_: str, step: int | None = None) -> str:
    """Converts weights; returns a report: how far the networks differ, and what was written.

    Args:
      source: Workdir of a run, or file of weights.
      target: File or folder to write.
      format_: One of formats.FORMATS.
      step: Step of the checkpoint; None uses the latest.

    Raises:
      UserError: The source cannot be read, the format cannot represent it, or the outputs differ.
    """
    return write(open_weights(source, step), target, format_)


def write(weights: Weights, target: str, format_: str) -> str:
    """Writes weights as `convert` does, and returns its report.

    Args:
      weights: Weights to write.
      target: File or folder to write.
      format_: One of formats.FORMATS.

    Raises:
      UserError: The format cannot represent the weights, or the outputs differ.
    """
    errors.check_choice('--format', format_, formats.FORMATS)
    chosen = formats.FORMATS[format_]
    formats.check(chosen, weights, target)
    parts = formats.to_torch(weights)
    written_sides = () if chosen.ours else (parts,)
    sides = [side for side in (weights.parts, *written_sides) if side]
    largest = difference(weights, sides) if sides else 0.0
    if not sides:
        compared = ''
    elif largest is None:
        compared = 'torch is not installed: the networks were not compared\n'
    elif largest <= LIMIT:
        compared = (
            f"largest difference between JAX and PyTorch: {largest:.1e} of the outputs' scale\n"
        )
    else:
        raise errors.UserError(
            f'the outputs of JAX and PyTorch differ by {largest:.1e} of their scale; expected at '
            f'most {LIMIT:.0e}, nothing was written'
        )
    chosen.write(weights, parts, target)
    written = ', '.join(parts or weights.params) if chosen.heads else 'backbone'
    origin, config = weights.origin, weights.config
    images = ', '.join(f'{key} {config["augment"][key]}' for key in ('size', 'mean', 'std'))
    if weights.assumed:
        images += f" (ImageNet's {weights.assumed} are assumed: {origin} does not state them)"
    if weights.selection:
        origin += f' ({weights.selection})'
    return (
        f'{compared}{target} contains {written} of {origin}: {config["model"]["name"]}, '
        f'for images of {images}'
    )
