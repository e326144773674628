"""SimSiam self-supervised pre-training in JAX and Flax.

The names below are loaded when they are first used, because JAX takes long to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from simsiam_jax._version import __version__

if TYPE_CHECKING:
    from simsiam_jax.api.diagnosis import advice, doctor
    from simsiam_jax.api.encoder import Encoder
    from simsiam_jax.api.evaluation import evaluate
    from simsiam_jax.api.training import pretrain
    from simsiam_jax.checkpoints.encoder import load_encoder
    from simsiam_jax.errors import UserError

__all__ = [
    'Encoder',
    'UserError',
    '__version__',
    'advice',
    'doctor',
    'evaluate',
    'load_encoder',
    'pretrain',
]

_MODULES = {
    'Encoder': 'api.encoder',
    'UserError': 'errors',
    'advice': 'api.diagnosis',
    'doctor': 'api.diagnosis',
    'evaluate': 'api.evaluation',
    'load_encoder': 'checkpoints.encoder',
    'pretrain': 'api.training',
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
