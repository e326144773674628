"""One training step for every method."""

import math
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

from simsiam_jax.methods.contract import ForwardFn, Method, forward
from simsiam_jax.models.network import Outputs
from simsiam_jax.training import monitor
from simsiam_jax.training.accumulate import accumulate_gradients
from simsiam_jax.training.mesh import DATA

Views = list[Array]


@flax.struct.dataclass
class TrainState:
    """All that training changes; randomness comes from the step, so none is kept here.

    Attributes:
      step: int32, the steps taken.
      target: the momentum network's {'params', 'batch_stats'}; None where the method has none.
      method_state: the method's own state.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    target: Any
    method_state: Any


def init_state(
    method: Method, tx: optax.GradientTransformation, seed: int, view_shape: tuple[int, ...]
) -> TrainState:
    """The state at step 0; `view_shape` is (H, W, C)."""

    def init(key: Array) -> TrainState:
        variables = method.network.init(key, jnp.zeros((1, *view_shape)))
        params = method.project_params(variables['params'])
        batch_stats = variables.get('batch_stats', {})
        target = None if method.momentum is None else {'params': params, 'batch_stats': batch_stats}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=tx.init(params),
            target=target,
            method_state=method.init_method_state(jax.random.fold_in(key, 1)),
        )

    key = jax.random.key(seed)
    # It runs once: on a CPU, compiling it well takes four times as long as compiling it. Where only
    # shapes are asked for, nothing is compiled, and options are refused.
    quick = jax.default_backend() == 'cpu' and not isinstance(key, jax.core.Tracer)
    options = {'xla_backend_optimization_level': 0} if quick else None
    return jax.jit(init, compiler_options=options)(key)


def forward_views(
    network: nn.Module,
    params: Any,
    batch_stats: Any,
    views: Sequence[Array],
    forward_fn: ForwardFn = forward,
    step: Array | int = 0,
) -> tuple[list[Outputs], Any]:
    """Outputs of each view and the running BN statistics after all of them.

    The views pass one after the other: one batch of both would have other BN statistics.
    """
    outputs = []
    for i, view in enumerate(views):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), i)
        variables = {'params': params, 'batch_stats': batch_stats}
        output, batch_stats = forward_fn(network, variables, view, key)
        outputs.append(output)
    return outputs, batch_stats


def make_train_step(
    method: Method,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    to_views: Callable[[Any], Views] = list,
    total_steps: float | int = math.inf,
    *,
    accumulation_steps: int = 1,
    cached_targets: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """(state, batch) -> (state, metrics), compiled over the mesh; the state is donated.

    Args:
      method: what is learnt; its BN statistics must be those of all devices.
      to_views: a device's share of the batch -> its views, float [B, H, W, C] each, the two large
        ones first.
      total_steps: of the whole training, over which the target's momentum changes.
      accumulate: so many parts of the batch are computed one after the other; see in_parts.
      cached_targets: the batch brings the target's z of its views along, see alternation.py.
    """

    def loss_fn(params: Any, state: TrainState, batch: Any) -> tuple[Array, Any]:
        views = to_views(batch)
        online, batch_stats = forward_views(
            method.network, params, state.batch_stats, views, method.online_forward, state.step
        )
        target, kept = online[:2], state.target
        if method.momentum is not None:
            target, stats = forward_views(
                method.network,
                kept['params'],
                kept['batch_stats'],
                views[:2],
                method.target_forward,
                state.step,
            )
            kept = kept | {'batch_stats': stats}
        if cached_targets:
            target = [Outputs(feature=None, z=z, p=None) for z in batch['target']]
        index = (batch['index'],) if method.uses_indices else ()
        loss, method_state, metrics = method.loss(online, target, state.method_state, *index)
        z_std = sum(monitor.z_std(view.z, DATA) for view in online) / len(online)
        changes = {'batch_stats': batch_stats, 'target': kept, 'method_state': method_state}
        return loss, (changes, metrics | {'z_std': z_std})

    compute = accumulate_gradients(jax.value_and_grad(loss_fn, has_aux=True), accumulation_steps)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        # Each device differentiates its own loss in its own copy of the parameters; the mean
        # over devices is then taken once, by us and not by the transpose of a broadcast.
        params = jax.lax.pcast(state.params, (DATA,), to='varying')
        (loss, (changes, metrics)), grads = compute(params, state, batch)
        loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), DATA)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = method.project_params(optax.apply_updates(state.params, updates))
        target = changes['target']
        if method.momentum is not None:
            m = method.momentum(state.step / total_steps)
            average = optax.incremental_update(params, target['params'], 1 - m)
            target = target | {'params': average}
        state = TrainState(
            state.step + 1,
            params,
            changes['batch_stats'],
            opt_state,
            target,
            changes['method_state'],
        )
        return state, metrics | {'loss': loss}

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=(P(), P()))
    return jax.jit(sharded, donate_argnums=0)
