"""Builds the real training step of a configuration with synthetic images, or with shapes alone."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from simsiam_jax import config_keys, errors
from simsiam_jax.data import host
from simsiam_jax.data.recipe import Recipe, sample_batch_params
from simsiam_jax.data.sampler import IndexSampler
from simsiam_jax.methods.contract import Method
from simsiam_jax.models.backbones import Backbone
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.tools.benchmark import cost_model
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import step

IMAGENET = 1_281_167


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step and its arguments.

    Attributes:
      config: Configuration of the run.
      mesh: Devices of the run.
      method: What is trained.
      recipes: Augmentation of each view.
      sampler: Order of the images.
      image_size: Side of images that stay on the device; 0 uses crops from the host, or images on
        config.data.canvas.
      init: Function () -> state at step 0.
      train_step: Function (state, batch) -> (state, metrics).
    """

    config: ConfigDict
    mesh: Mesh
    method: Method
    recipes: tuple[Recipe, ...]
    sampler: IndexSampler
    image_size: int
    init: Callable[[], step.TrainState]
    train_step: Callable[[step.TrainState, Any], tuple[step.TrainState, Any]]

    def batch(self, pixels: Callable[[tuple[int, ...]], np.ndarray]) -> dict[str, Any]:
        """Returns a global batch for host.to_views; `pixels` makes images from their shape."""
        data, size = self.config.data, self.config.batch_size
        index, views = sample_batch_params(self.sampler, self.recipes, 0, slice(0, size))
        batch: dict[str, Any] = {'index': index, 'label': np.zeros(size, np.int64)}
        errors.check_choice('data.on_device', data.on_device, host.ON_DEVICE)
        if self.image_size or data.on_device == 'all':
            side = self.image_size or data.canvas
            batch['image'] = pixels((size, side, side, data.channels))
            if not self.image_size:
                batch['size'] = np.full((size, 2), side, np.float32)
            return batch | {'views': views}
        batch['crops'] = [pixels((size, r.size, r.size, data.channels)) for r in self.recipes]
        return batch | ({'views': views} if data.on_device == 'color' else {})

    def abstract(self) -> tuple[Any, Any]:
        """Returns the shapes of the state, replicated, and of a batch, sharded over the devices."""
        empty = self.batch(functools.partial(np.broadcast_to, np.uint8(0)))
        return (
            self._placed(jax.eval_shape(self.init), P()),
            self._placed(empty, P(mesh_lib.DATA)),
        )

    def _placed(self, tree: Any, spec: P) -> Any:
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding
            ),
            tree,
        )

    def analytic_kernels(self, fusion: str) -> list[cost_model.KernelCost]:
        """Returns the kernels of a device in a step: views through the network, and the update.

        Args:
          fusion: One of cost_model.FUSION_LEVELS.
        """
        images = self.config.batch_size // self.mesh.size
        width = 2 if self.config.model.dtype == 'bfloat16' else 4
        costs = []
        for layers, backward in self._forward_passes():
            costs += cost_model.kernels(layers, images, fusion, width, backward=backward)
        return [*costs, cost_model.KernelCost(0, cost_model.update_bytes(self.parameters))]

    def allreduce_bytes(self) -> dict[str, list[int]]:
        """Returns the bytes of each all-reduce in a step, without those of the loss.

        Each part of an accumulated batch has its own BN statistics. Methods with BN over groups of
        images do not exchange statistics.
        """
        parts = (
            self.config.optim.gradient_accumulation_steps
            if self.method.network.backbone.axis_name
            else 0
        )
        norms: list[int] = []
        for layers, backward in self._forward_passes():
            norms += cost_model.statistics_bytes(layers, backward=backward) * parts
        return {'gradients': [4 * self.parameters], 'BN statistics': norms}

    @functools.cached_property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(self.init).params))

    def _forward_passes(self) -> Iterator[tuple[list[cost_model.Layer], bool]]:
        """Yields the layers of each forward pass of a view, and whether it has a backward pass."""
        if isinstance(self.method.network.backbone, Backbone):
            errors.warn_once(
                f'the computed operations and bytes of {self.config.model.name} are those of its '
                'convolutions, fully connected layers and BN, without attention and other norms'
            )
        channels, sizes = self.config.data.channels, [recipe.size for recipe in self.recipes]
        layers = {
            size: cost_model.layers(self.method.network, size, channels) for size in set(sizes)
        }
        for i, size in enumerate(sizes):
            yield layers[size], True
            if i < 2 and self.method.momentum is not None:
                yield layers[size], False


def build(
    config: ConfigDict, mesh: Mesh, *, images: int = IMAGENET, image_size: int = 0
) -> Workload:
    """Builds the step of a run, for devices that need not be here.

    Args:
      config: Configuration of a pre-training.
      mesh: Devices of the run.
      images: Number of images in an epoch.
      image_size: Side of images that stay on the device; 0 uses crops.

    Raises:
      UserError: A key is unknown, or a value is invalid.
    """
    config_keys.check(config)
    mesh_lib.check_batch_size(
        'batch_size', config.batch_size, mesh, config.optim.gradient_accumulation_steps
    )
    if config.alternate.steps != 1:
        raise errors.UserError(
            f'cannot measure config.alternate.steps={config.alternate.steps}; expected 1. '
            'Set config.alternate.steps=1'
        )
    config = pretrain_setup.without_measuring(config)
    method, recipes = pretrain_setup.build_method(config), pretrain_setup.build_recipes(config)
    sampler = IndexSampler(config.seed, images, config.batch_size)
    tx, _ = pretrain_setup.build_optimizer(config, sampler.steps_per_epoch)
    train_step = step.make_train_step(
        method,
        tx,
        mesh,
        functools.partial(host.to_views, recipes=recipes),
        config.epochs * sampler.steps_per_epoch,
        accumulation_steps=config.optim.gradient_accumulation_steps,
        merge_views=config.merge_views,
    )
    shape = (recipes[0].size, recipes[0].size, config.data.channels)
    init = functools.partial(step.init_state, method, tx, config.seed, shape)
    return Workload(config, mesh, method, recipes, sampler, image_size, init, train_step)
