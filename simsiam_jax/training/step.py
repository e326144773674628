"""The training step, which is the same for every method, and its state."""

import functools
import itertools
import math
import operator
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
from simsiam_jax.models import resnet
from simsiam_jax.models.network import Outputs
from simsiam_jax.training import monitor
from simsiam_jax.training.accumulate import accumulate_gradients
from simsiam_jax.training.mesh import DATA

Views = list[Array]


@flax.struct.dataclass
class TrainState:
    """Everything that training changes. Randomness is derived from the step, so no key is stored.

    Attributes:
      step: Number of steps taken, int32.
      params: Weights of the network.
      batch_stats: Running BN statistics of the network.
      opt_state: State of the optimizer.
      target: {'params', 'batch_stats'} of the momentum network; None if the method has none.
      method_state: State of the method, such as MoCo's queue.
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
    """Returns the state at step 0.

    Args:
      method: The method; its network is initialized.
      tx: The optimizer.
      seed: Seed of the random weights.
      view_shape: Shape of a view, (H, W, C).
    """

    def init(key: Array) -> TrainState:
        keys = {'params': key, 'dropout': jax.random.fold_in(key, 2)}
        variables = nn.unbox(method.network.init(keys, jnp.zeros((1, *view_shape))))
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
    # On a CPU, optimizing this program takes four times as long as compiling it, and it runs once.
    # Under eval_shape (the key is a tracer) nothing is compiled, and JAX rejects the options.
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
    *,
    merge: bool = False,
) -> tuple[list[Outputs], Any]:
    """Returns the outputs of each view and the running BN statistics after all views.

    Each view has BN statistics of its own, also if they pass through the network together.

    Args:
      network: The network.
      params: Weights of the network.
      batch_stats: Running BN statistics before the first view.
      views: Views of a device's images, [B, H, W, C] each.
      forward_fn: Runs the network on a view; see Method.
      step: Step that the key of each view is derived from.
      merge: Whether consecutive views of one size pass through the network together. Their BN must
        have resnet.BN_MOMENTUM.
    """
    outputs: list[Outputs] = []
    by_shape = itertools.groupby(views, lambda view: view.shape)
    for group in [list(same) for _, same in by_shape] if merge else [[view] for view in views]:
        keys = [
            jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), len(outputs) + i)
            for i in range(len(group))
        ]
        variables = {'params': params, 'batch_stats': batch_stats}
        if len(group) == 1:
            output, batch_stats = forward_fn(network, variables, group[0], keys[0])
            outputs.append(output)
            continue
        together = jax.vmap(functools.partial(forward_fn, network, variables))
        merged, updated = together(jnp.stack(group), jnp.stack(keys))
        outputs += [jax.tree.map(operator.itemgetter(i), merged) for i in range(len(group))]
        batch_stats = jax.tree.map(_in_turn, batch_stats, updated)
    return outputs, batch_stats


def _in_turn(before: Array, updated: Array) -> Array:
    """Returns a running statistic after several views, given what each makes of `before`."""
    after = before
    for own in updated:
        after = own + resnet.BN_MOMENTUM * (after - before)
    return after


def make_train_step(
    method: Method,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    to_views: Callable[[Any], Views] = list,
    total_steps: float | int = math.inf,
    *,
    accumulation_steps: int = 1,
    cached_targets: bool = False,
    merge_views: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Returns (state, batch) -> (state, metrics), compiled over the mesh; it donates the state.

    Args:
      method: The method to train; its BN must be synchronized over all devices.
      tx: The optimizer.
      mesh: Mesh of the devices.
      to_views: Makes the views of a device's share of a batch, float [B, H, W, C] each, the two
        large views first.
      total_steps: Total number of training steps, over which the target's momentum changes.
      accumulation_steps: Number of parts of a batch; see accumulate.py.
      cached_targets: Uses the target's z in batch['target']; see alternation.py.
      merge_views: Whether the views pass through the network together; see forward_views().
    """

    def loss_fn(params: Any, state: TrainState, batch: Any) -> tuple[Array, Any]:
        views = to_views(batch)
        online, batch_stats = forward_views(
            method.network,
            params,
            state.batch_stats,
            views,
            method.online_forward,
            state.step,
            merge=merge_views,
        )
        target, target_state = online[:2], state.target
        if method.momentum is not None:
            target, stats = forward_views(
                method.network,
                target_state['params'],
                target_state['batch_stats'],
                views[:2],
                method.target_forward,
                state.step,
                merge=merge_views,
            )
            target_state = target_state | {'batch_stats': stats}
        if cached_targets:
            target = [Outputs(feature=None, z=z, p=None) for z in batch['target']]
        index = (batch['index'],) if method.uses_indices else ()
        loss, method_state, metrics = method.loss(online, target, state.method_state, *index)
        z_std = sum(monitor.z_std(view.z, DATA) for view in online) / len(online)
        changes = {
            'batch_stats': batch_stats,
            'target': target_state,
            'method_state': method_state,
        }
        return loss, (changes, metrics | {'z_std': z_std})

    compute = accumulate_gradients(jax.value_and_grad(loss_fn, has_aux=True), accumulation_steps)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        # Each device differentiates its own loss with respect to its own copy of the parameters.
        # pmean below averages the gradients; without the cast, a broadcast's transpose sums them.
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
            method.end_step(changes['method_state']),
        )
        return state, metrics | {'loss': loss}

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=(P(), P()))
    return jax.jit(sharded, donate_argnums=0)
