"""Summaries that a run prints or logs: parameters, memory, views, the final table."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.data.recipe import Recipe
from simsiam_jax.tasks import memory
from simsiam_jax.training.step import TrainState


def overview(params: dict[str, Any]) -> str:
    """Returns a table of the parameters and their shapes; a plain list without clu."""
    try:
        from clu import parameter_overview
    except ImportError:
        flat = checkpoint_reader.flatten(params)
        return '\n'.join(f'{name} {list(x.shape)}' for name, x in flat.items())
    return parameter_overview.get_parameter_overview(params, include_stats=False)


def parameters(params: dict[str, Any]) -> str:
    """Returns one line with the number of parameters, in total and by part."""
    counts = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in params.items()}
    parts = ', '.join(f'{part} {count:,}' for part, count in counts.items())
    return f'{sum(counts.values()):,} parameters: {parts}'


def method_state(method: str, tree: Any) -> str:
    """Returns one line with the arrays that a method keeps between steps, and their size."""
    arrays = checkpoint_reader.flatten(tree).items()
    parts = ', '.join(f'{name} {x.dtype}{list(x.shape)}'.strip() for name, x in arrays)
    size = memory.size_of(tree) / 2**20
    return f'{method} keeps {size:,.1f} MiB between steps on each device: {parts}'


def dry_run(train_step: Any, init: Callable[[], TrainState], batch: Any, mesh: Mesh) -> str:
    """Compiles the step, and returns the number of parameters and the memory per device.

    With --verbosity=1 the shapes of the parameters and of the batch come first.

    Args:
      train_step: Compiled function of (state, batch).
      init: Function () -> state; only its shapes are used.
      batch: Device batch.
      mesh: Devices of the run.
    """
    replicated = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), jax.eval_shape(init)
    )
    planned = train_step.trace(state, batch).lower().compile().memory_analysis()
    gib = 2**30
    shapes = ['shapes of parameters and batch: add --verbosity=1']
    if logging.level_debug():
        shapes = [
            overview(state.params),
            *(
                f'batch{jax.tree_util.keystr(path)}: {x.dtype} {list(x.shape)}'
                for path, x in jax.tree_util.tree_leaves_with_path(batch)
            ),
        ]
    lines = [
        *shapes,
        parameters(state.params),
        f'memory per device: state and batch {planned.argument_size_in_bytes / gib:.2f} GiB, '
        f'activations {planned.temp_size_in_bytes / gib:.2f} GiB '
        f'(as compiled for {mesh.devices.flat[0].device_kind})',
    ]
    return '\n'.join(lines)


def view_grid(
    batch: Any,
    to_views: Callable[[Any], list[jax.Array]],
    recipes: Sequence[Recipe],
    images: int = 16,
) -> Float[np.ndarray, 'H W 3']:
    """Returns a picture of the views of some images, two images per row, values in [0, 1].

    Views below 64 pixels are enlarged to about 64. If images are not RGB, their first channel is
    shown.

    Args:
      batch: Device batch.
      to_views: Function, batch -> normalized views [B, H, W, C].
      recipes: Augmentation of each view.
      images: Number of images, from the start of the batch.
    """
    replicated = NamedSharding(jax.tree.leaves(batch)[0].sharding.mesh, P())
    views = jax.jit(
        lambda batch: to_views(jax.tree.map(lambda x: x[:images], batch)), out_shardings=replicated
    )(batch)
    large = max(recipe.size for recipe in recipes)
    enlarge = max(1, 64 // large)
    pictures = []
    for view, recipe in zip(views, recipes, strict=True):
        picture = np.asarray(view) * np.asarray(recipe.std) + np.asarray(recipe.mean)
        if picture.shape[-1] != 3:
            picture = np.repeat(picture[..., :1], 3, axis=-1)
        picture = picture.repeat(enlarge, 1).repeat(enlarge, 2)
        below = 2 + enlarge * (large - recipe.size)
        pictures.append(np.pad(picture, ((0, 0), (2, below), (2, 2), (0, 0)), constant_values=1))
    pairs = np.pad(np.concatenate(pictures, 2), ((0, 0), (2, 2), (4, 4), (0, 0)), constant_values=1)
    left, right = np.concatenate(pairs[0::2]), np.concatenate(pairs[1::2][: len(pairs[0::2])])
    if len(left) > len(right):  # an odd number of images
        right = np.pad(right, ((0, len(left) - len(right)), (0, 0), (0, 0)), constant_values=1)
    return np.concatenate([left, right], 1).clip(0, 1)
