"""Linear classifiers on the features of a backbone, trained together: probes, fine-tuning."""

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

from simsiam_jax.methods.contract import mean_over_devices
from simsiam_jax.models.backbones import AnyBackbone
from simsiam_jax.training.accumulate import accumulate_gradients
from simsiam_jax.training.mesh import DATA
from simsiam_jax.training.step import TrainState

Views = list[Array]


def init_heads(heads: int, features: int, classes: int, seed: int) -> dict[str, Any]:
    """Returns identical heads {'kernel' [heads, D, C], 'bias' [heads, C]}.

    Kernels are drawn from N(0, 0.01), as in SimSiam's official code; biases are 0.
    """
    kernel = 0.01 * jax.random.normal(jax.random.key(seed), (features, classes))
    return {
        'kernel': jnp.tile(kernel, (heads, 1, 1)),
        'bias': jnp.zeros((heads, classes)),
    }


def logits(
    heads: dict[str, Any], features: Float[Array | np.ndarray, 'B D']
) -> Float[Array, 'heads B C']:
    """Returns the logits of every head for every feature, in float32."""
    products = jnp.einsum('bd,hdc->hbc', features, heads['kernel'], precision='highest')
    return products + heads['bias'][:, None]


def head_cross_entropy(
    heads: dict[str, Any], features: Float[Array, 'B D'], labels: Int[Array, 'B']
) -> tuple[Float[Array, 'heads'], Float[Array, 'heads']]:
    """Returns (mean cross-entropy, accuracy) of every head."""
    outputs = logits(heads, features)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs, jnp.broadcast_to(labels, outputs.shape[:2])
    )
    return losses.mean(1), (outputs.argmax(-1) == labels).mean(1)


def each_head(
    make: Callable[[Any, Any], optax.GradientTransformation],
    learning_rates: Float[Array | np.ndarray, 'heads'],
    weight_decays: Float[Array | np.ndarray, 'heads'],
) -> optax.GradientTransformation:
    """Returns one optimizer per head, `make(learning_rate, weight_decay)`, vmapped over heads."""
    rates = jnp.array(learning_rates, jnp.float32)
    decays = jnp.array(weight_decays, jnp.float32)

    def init(params: Any) -> Any:
        return jax.vmap(lambda rate, decay, p: make(rate, decay).init(p))(rates, decays, params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def update_head(rate: Array, decay: Array, g: Any, s: Any, p: Any) -> tuple[Any, Any]:
            return make(rate, decay).update(g, s, p)

        return jax.vmap(update_head)(rates, decays, grads, state, params)

    return optax.GradientTransformation(init, update)


def make_train_step(
    backbone: AnyBackbone,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    to_views: Callable[[Any], Views],
    *,
    frozen: bool,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Returns (state, batch) -> (state, metrics), compiled over the mesh; it donates the state.

    The state's params are {'backbone', 'head'}. The metrics are the lowest loss and the highest
    accuracy of all heads.

    Args:
      backbone: Network whose features are classified.
      tx: Optimizer of {'head'} if `frozen`, otherwise of all params.
      mesh: Mesh of the devices.
      to_views: Makes one normalized view of a device's share of a batch; the classes are in
        'label'.
      frozen: Runs the backbone in evaluation mode and keeps its weights and statistics.
      accumulation_steps: Number of parts of a batch; see accumulate.py.
    """

    def loss_fn(params: Any, state: TrainState, batch: Any) -> tuple[Array, Any]:
        (view,) = to_views(batch)
        features: Any
        weights = params.get('backbone', state.params['backbone'])
        variables = {'params': weights, 'batch_stats': state.batch_stats['backbone']}
        if frozen:
            features, stats = backbone.apply(variables, view), variables['batch_stats']
        else:
            key = jax.random.fold_in(jax.random.key(0), state.step)
            features, changed = backbone.apply(
                variables, view, train=True, mutable='batch_stats', rngs={'dropout': key}
            )
            stats = mean_over_devices(backbone, changed.get('batch_stats', {}))
        losses, top1 = head_cross_entropy(params['head'], features, batch['label'])
        changes = {'batch_stats': {'backbone': stats}}
        # The sum trains each head on its own loss: no head's loss depends on another head.
        return losses.sum(), (changes, {'loss': losses, 'top1': top1})

    compute = accumulate_gradients(jax.value_and_grad(loss_fn, has_aux=True), accumulation_steps)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        trained = {'head': state.params['head']} if frozen else state.params
        local = jax.lax.pcast(trained, (DATA,), to='varying')
        (_, (changes, heads)), grads = compute(local, state, batch)
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
    """Returns the number of top-1 and of top-5 hits and the sum of the cross-entropy.

    Args:
      heads: Weights of the heads.
      features: Features of the images.
      labels: Classes of the images.
      counted: Which images count; the others pad the batch.
    """
    outputs = logits(heads, features)
    _, ranked = jax.lax.top_k(outputs, min(5, outputs.shape[-1]))
    hits = ranked == labels[:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs, jnp.broadcast_to(labels, outputs.shape[:2])
    )
    return jnp.stack([(x * counted).sum(-1) for x in (hits[..., 0], hits.any(-1), losses)])


def grid(
    learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> tuple[Float[np.ndarray, 'heads'], Float[np.ndarray, 'heads']]:
    """Returns every rate with every decay, as one array of rates and one of decays."""
    pairs = list(itertools.product(learning_rates, weight_decays))
    rates, decays = np.array(pairs, np.float64).reshape(-1, 2).T
    return rates, decays
