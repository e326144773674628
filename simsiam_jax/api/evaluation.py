"""Evaluation of an encoder from Python."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.api.encoder import Encoder
from simsiam_jax.data import python_sources
from simsiam_jax.tasks import eval_setup, knn, memory, probe
from simsiam_jax.tasks.verdict import Verdict

LabeledImages = str | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Accuracy of an encoder beside raw pixels and the random network.

    Attributes:
      knn: Weighted vote of the nearest neighbors.
      linear: The better of two kinds of linear classifiers, chosen on a part of the training set.
    """

    knn: Verdict
    linear: Verdict

    def __str__(self) -> str:
        return f'{self.knn}\n{self.linear}'


def evaluate(encoder: Encoder, train: LabeledImages, test: LabeledImages) -> Evaluation:
    """Evaluates an encoder by kNN and by linear classifiers on its features.

    ::

        report = simsiam_jax.evaluate(encoder, train=(images, labels), test=(images, labels))
        report.linear.result['accuracy']['checkpoint']['top1']

    Args:
      encoder: Encoder.
      train: (images, labels) to learn from, images as pretrain() takes them; or a labeled source
        such as 'folder:DIR'.
      test: (images, labels) or a source to test on.

    Raises:
      UserError: The images or labels cannot be used.
    """
    sets = {'train': train, 'test': test}
    given = _open({name: pair for name, pair in sets.items() if not isinstance(pair, str)})
    specs = {
        name: pair if isinstance(pair, str) else f'{python_sources.KIND}:{name}'
        for name, pair in sets.items()
    }
    with python_sources.provide(**given):
        return Evaluation(
            _evaluate(knn.evaluate, config_lib.knn(), encoder, specs),
            _evaluate(probe.evaluate, config_lib.probe(), encoder, specs),
        )


def _open(sets: dict[str, Sequence[Any]]) -> dict[str, Any]:
    """Returns sources by name, whose classes are those of all the sets."""
    for name, pair in sets.items():
        if len(pair) != 2:
            raise errors.UserError(
                f'{name} has {len(pair)} parts; expected (images, labels), or a source such as '
                'folder:DIR'
            )
    given = [np.ravel(labels) for _, labels in sets.values() if labels is not None]
    known = np.concatenate(given) if given else np.empty(0, int)
    names = sorted(set(map(str, known)))
    if np.issubdtype(known.dtype, np.integer) and known.size:
        names = list(map(str, range(int(known.max()) + 1)))
    return {
        name: python_sources.open_images(images, labels, tuple(names), name)
        for name, (images, labels) in sets.items()
    }


def _evaluate(
    task: Callable[[eval_setup.EvalSetup], tuple[Any, Verdict]],
    config: ConfigDict,
    encoder: Encoder,
    specs: dict[str, str],
) -> Verdict:
    config.init_from = encoder.origin
    config.eval.update(specs)
    with memory.oom_as_user_error(config):
        _, verdict = task(eval_setup.prepare(config, encoder=encoder))
    return verdict
