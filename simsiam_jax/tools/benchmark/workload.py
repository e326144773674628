"""A configuration's real training step without its data: on synthetic images, or on none."""

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
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.tools.benchmark import cost_model
from simsiam_jax.training import mesh as mesh_lib
from simsiam_jax.training import step

IMAGENET = 1_281_167


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step and what it is called on.

    Attributes:
      image_size: side of the images where a source is kept on the devices whole; 0: crops come
        from the host, or images on config.data.canvas.
    """

    config: ConfigDict
    mesh: Mesh
    method: Method
    recipes: tuple[Recipe, ...]
    order: IndexSampler
    image_size: int
    init: Callable[[], step.TrainState]
    train_step: Callable[[step.TrainState, Any], tuple[step.TrainState, Any]]

    def batch(self, pixels: Callable[[tuple[int, ...]], np.ndarray]) -> dict[str, Any]:
        """A global batch for host.to_views, its images made by `pixels` from their shape."""
        data, size = self.config.data, self.config.batch_size
        index, views = sample_batch_params(self.order, self.recipes, 0, slice(0, size))
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
        """Shapes of the state, the same on every device, and of a batch, divided among them."""
        none = self.batch(functools.partial(np.broadcast_to, np.uint8(0)))
        return (
            self._placed(jax.eval_shape(self.init), P()),
            self._placed(none, P(mesh_lib.DATA)),
        )

    def _placed(self, tree: Any, spec: P) -> Any:
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding
            ),
            tree,
        )

    def analytic_kernels(self, way: str) -> list[cost_model.KernelCost]:
        """By hand, of a device's share of a step: the views of the network, and the update."""
        images = self.config.batch_size // self.mesh.size
        width = 2 if self.config.model.dtype == 'bfloat16' else 4
        made = []
        for layers, backward in self._passes():
            made += cost_model.kernels(layers, images, way, width, backward=backward)
        return [*made, cost_model.KernelCost(0, cost_model.update_bytes(self.parameters))]

    def allreduce_bytes(self) -> dict[str, list[int]]:
        """By hand, the bytes of every sum over the devices in a step; the loss's own left out.

        Parts of an accumulated batch have statistics of their own; a method whose BN is of groups
        of images has none between devices.
        """
        parts = (
            self.config.optim.gradient_accumulation_steps
            if self.method.network.backbone.axis_name
            else 0
        )
        norms: list[int] = []
        for layers, backward in self._passes():
            norms += cost_model.statistics_bytes(layers, backward=backward) * parts
        return {'gradients': [4 * self.parameters], 'BN statistics': norms}

    @functools.cached_property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(self.init).params))

    def _passes(self) -> Iterator[tuple[list[cost_model.Layer], bool]]:
        """Layers of every view's way through the network, and whether gradients come back."""
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
    """The step of a run on so many images, on devices that need not be there.

    Raises:
      UserError: a key is unknown, or a value impossible.
    """
    config_keys.check(config)
    mesh_lib.check_batch_size(
        'batch_size', config.batch_size, mesh, config.optim.gradient_accumulation_steps
    )
    if config.alternate.steps != 1:
        raise errors.UserError(
            f'config.alternate.steps is {config.alternate.steps}; only its single step can be '
            'measured, set it to 1'
        )
    method, recipes = pretrain_setup.build_method(config), pretrain_setup.build_recipes(config)
    order = IndexSampler(config.seed, images, config.batch_size)
    tx, _ = pretrain_setup.build_optimizer(config, order.steps_per_epoch)
    train_step = step.make_train_step(
        method,
        tx,
        mesh,
        functools.partial(host.to_views, recipes=recipes),
        config.epochs * order.steps_per_epoch,
        accumulation_steps=config.optim.gradient_accumulation_steps,
    )
    shape = (recipes[0].size, recipes[0].size, config.data.channels)
    init = functools.partial(step.init_state, method, tx, config.seed, shape)
    return Workload(config, mesh, method, recipes, order, image_size, init, train_step)
