"""Linear classifiers on a backbone's features, many at once: probes and fine-tuning."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from simsiam_jax.models.resnet import ResNet
from simsiam_jax.training.accumulate import accumulate_gradients
from simsiam_jax.training.mesh import DATA
from simsiam_jax.training.step import TrainState

Views = list[Array]


def init_heads(heads: int, features: int, classes: int, seed: int) -> dict[str, Any]:
    """{'kernel' [heads, D, C], 'bias' [heads, C]}, all alike: N(0, 0.01), as officially."""
    kernel = 0.01 * jax.random.normal(jax.random.key(seed), (features, classes))
    return {
        'kernel': jnp.tile(kernel, (heads, 1, 1)),
        'bias': jnp.zeros((heads, classes)),
    }


def logits(
    heads: dict[str, Any], features: Float[Array | np.ndarray, 'B D']
) -> Float[Array, 'heads B C']:
    """Of every head for every feature, in float32."""
    return jnp.einsum('bd,hdc->hbc', features, heads['kernel']) + heads['bias'][:, None]


def head_cross_entropy(
    heads: dict[str, Any], features: Float[Array, 'B D'], labels: Int[Array, 'B']
) -> tuple[Float[Array, 'heads'], Float[Array, 'heads']]:
    """(mean loss, share of right classes) of every head."""
    outputs = logits(heads, features)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs, jnp.broadcast_to(labels, outputs.shape[:2])
    )
    return losses.mean(1), (outputs.argmax(-1) == labels).mean(1)


def each_head(
    make: Callable[[Any, Any], optax.GradientTransformation],
    learning_rates: Float[np.ndarray, 'heads'],
    weight_decays: Float[np.ndarray, 'heads'],
) -> optax.GradientTransformation:
    """One optimizer a head, `make(learning rate, weight decay)`, vmapped over the heads."""
    rates = jnp.array(learning_rates, jnp.float32)
    decays = jnp.array(weight_decays, jnp.float32)

    def init(params: Any) -> Any:
        return jax.vmap(lambda rate, decay, p: make(rate, decay).init(p))(rates, decays, params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(rate: Array, decay: Array, g: Any, s: Any, p: Any) -> tuple[Any, Any]:
            return make(rate, decay).update(g, s, p)

        return jax.vmap(one)(rates, decays, grads, state, params)

    return optax.GradientTransformation(init, update)


def make_train_step(
    backbone: ResNet,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    to_views: Callable[[Any], Views],
    *,
    frozen: bool,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """(state, batch) -> (state, metrics), compiled over the mesh; the state is donated.

    The state's params are {'backbone', 'head'}. Metrics are of the best head: the lowest loss
    and the highest share of right classes.

    Args:
      tx: of {'head'} where the backbone is frozen, else of all params.
      to_views: a device's share of the batch -> one normalized view; 'label' gives the classes.
      frozen: the backbone is in evaluation mode and keeps its weights and statistics.
      accumulate: so many parts of the batch are computed one after the other; see in_parts.
    """

    def loss_fn(params: Any, state: TrainState, batch: Any) -> tuple[Array, Any]:
        (view,) = to_views(batch)
        features: Any
        weights = params.get('backbone', state.params['backbone'])
        variables = {'params': weights, 'batch_stats': state.batch_stats['backbone']}
        if frozen:
            features, stats = backbone.apply(variables, view), variables['batch_stats']
        else:
            features, changed = backbone.apply(variables, view, train=True, mutable='batch_stats')
            stats = changed['batch_stats']
        losses, top1 = head_cross_entropy(params['head'], features, batch['label'])
        changes = {'batch_stats': {'backbone': stats}}
        # Heads have no share in each other.
        return losses.sum(), (changes, {'loss': losses, 'top1': top1})

    compute = accumulate_gradients(jax.value_and_grad(loss_fn, has_aux=True), accumulation_steps)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        trained = {'head': state.params['head']} if frozen else state.params
        trained_here = jax.lax.pcast(trained, (DATA,), to='varying')
        (_, (changes, heads)), grads = compute(trained_here, state, batch)
        grads, heads = jax.lax.pmean((grads, heads), DATA)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        params = state.params | optax.apply_updates(trained, updates)
        state = TrainState(state.step + 1, params, changes['batch_stats'], opt_state, None, None)
        return state, {'loss': jnp.nanmin(heads['loss']), 'top1': heads['top1'].max()}

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=(P(), P()))
    return jax.jit(sharded, donate_argnums=0)


def measure(
    heads: dict[str, Any],
    features: Float[Array | np.ndarray, 'B D'],
    labels: Int[Array | np.ndarray, 'B'],
    counted: Bool[Array | np.ndarray, 'B'],
) -> Float[Array, '3 heads']:
    """Sums over the counted images: class first, class among the first five, cross-entropy."""
    outputs = logits(heads, features)
    _, ranked = jax.lax.top_k(outputs, min(5, outputs.shape[-1]))
    right = ranked == labels[:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs, jnp.broadcast_to(labels, outputs.shape[:2])
    )
    return jnp.stack([(x * counted).sum(-1) for x in (right[..., 0], right.any(-1), losses)])


def grid(
    learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> tuple[Float[np.ndarray, 'heads'], Float[np.ndarray, 'heads']]:
    """Every rate with every decay."""
    pairs = list(itertools.product(learning_rates, weight_decays))
    rates, decays = np.array(pairs, np.float64).reshape(-1, 2).T
    return rates, decays
