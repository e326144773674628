"""One training step for every method."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from simsiam_jax.methods.contract import Method
from simsiam_jax.models.network import Outputs
from simsiam_jax.training import monitor
from simsiam_jax.training.accumulate import in_parts
from simsiam_jax.training.mesh import DATA

Views = list[Array]


@flax.struct.dataclass
class TrainState:
    """All that training changes; randomness comes from the step, so none is kept here.

    Attributes:
      step: int32, the steps taken.
      target: the momentum network's {'params', 'batch_stats'}; None where the method has none.
      memory: the method's own state.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    target: Any
    memory: Any


def init_state(
    method: Method, tx: optax.GradientTransformation, seed: int, view_shape: tuple[int, ...]
) -> TrainState:
    """The state at step 0; `view_shape` is (H, W, C)."""

    def init(key: Array) -> TrainState:
        variables = method.network.init(key, jnp.zeros((1, *view_shape)))
        params, batch_stats = variables['params'], variables.get('batch_stats', {})
        target = None if method.momentum is None else {'params': params, 'batch_stats': batch_stats}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=tx.init(params),
            target=target,
            memory=method.init_memory(),
        )

    return jax.jit(init)(jax.random.key(seed))


def forward(
    network: nn.Module, params: Any, batch_stats: Any, views: Sequence[Array]
) -> tuple[list[Outputs], Any]:
    """Outputs of each view and the running BN statistics after all of them.

    The views pass one after the other: one batch of both would have other BN statistics.
    """
    outputs = []
    for view in views:
        output, changed = network.apply(
            {'params': params, 'batch_stats': batch_stats}, view, train=True, mutable='batch_stats'
        )
        batch_stats = changed.get('batch_stats', {})
        outputs.append(output)
    return outputs, batch_stats


def make_train_step(
    method: Method,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    to_views: Callable[[Any], Views] = list,
    accumulate: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """(state, batch) -> (state, metrics), compiled over the mesh; the state is donated.

    Args:
      method: what is learnt; its BN must be synchronised over DATA.
      to_views: a device's share of the batch -> its views, float [B, H, W, C] each.
      accumulate: so many parts of the batch are computed one after the other; see in_parts.
    """

    def loss_fn(params: Any, state: TrainState, batch: Any) -> tuple[Array, Any]:
        views = to_views(batch)
        online, batch_stats = forward(method.network, params, state.batch_stats, views)
        target, kept = online, state.target
        if method.momentum is not None:
            target, stats = forward(method.network, kept['params'], kept['batch_stats'], views)
            kept = kept | {'batch_stats': stats}
        loss, memory, metrics = method.loss(online, target, state.memory)
        z_std = sum(monitor.z_std(view.z, DATA) for view in online) / len(online)
        changes = {'batch_stats': batch_stats, 'target': kept, 'memory': memory}
        return loss, (changes, metrics | {'z_std': z_std})

    compute = in_parts(jax.value_and_grad(loss_fn, has_aux=True), accumulate)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        # Each device differentiates its own loss in its own copy of the parameters; the mean
        # over devices is then taken once, by us and not by the transpose of a broadcast.
        params = jax.lax.pcast(state.params, (DATA,), to='varying')
        (loss, (changes, metrics)), grads = compute(params, state, batch)
        loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), DATA)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params, target = optax.apply_updates(state.params, updates), changes['target']
        if method.momentum is not None:
            m = method.momentum(state.step)
            average = optax.incremental_update(params, target['params'], 1 - m)
            target = target | {'params': average}
        state = TrainState(
            state.step + 1, params, changes['batch_stats'], opt_state, target, changes['memory']
        )
        return state, metrics | {'loss': loss}

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=(P(), P()))
    return jax.jit(sharded, donate_argnums=0)
