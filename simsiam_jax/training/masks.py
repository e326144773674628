"""Which weights an optimizer updates, and which decay."""

from typing import Any

import jax
import optax

# Names of weights of Transformers that have two or more dimensions and no decay.
_TOKENS = ('cls_token', 'pos_embed', 'pos_embedding', 'position_embedding', 'bias', 'scale')


def keep_frozen(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer that does not update weights of modules named frozen_*.

    Without such modules it is `tx`, with the same state.
    """

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _label(path), params)

    parts = optax.multi_transform({'trained': tx, 'frozen': optax.set_to_zero()}, labels)

    def choose(params: Any) -> optax.GradientTransformation:
        return parts if 'frozen' in jax.tree.leaves(labels(params)) else tx

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return choose(grads).update(grads, state, params)

    return optax.GradientTransformation(lambda params: choose(params).init(params), update)


def decayed(params: Any) -> Any:
    """Returns which weights decay: not those of norms, biases, class tokens and positions."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: w.ndim > 1 and not set(_names(path)[-1:]) & set(_TOKENS),
        params,
    )


def _names(path: Any) -> list[str]:
    return [str(getattr(part, 'key', '')) for part in path]


def _label(path: Any) -> str:
    return 'frozen' if any(name.startswith('frozen_') for name in _names(path)) else 'trained'
