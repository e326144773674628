"""Linear evaluation of a checkpoint by the paper's protocol: frozen backbone, 90 epochs.

    python -m simsiam_jax.main --config=configs/linear.py --workdir=DIR --config.init_from=RUN

`linear.py:lars` (the default) is LARS at batch 4096 with base rate 0.1, as in the official code.
The paper states 0.02: --config.optim.learning_rates='(0.02,)'. Result of the paper: 68.1% after
the baseline of configs/imagenet.py. `linear.py:sgd` is SGD at batch 256, rate 30, about a point
lower.

`linear.py:sweep` trains many heads at once, one for each rate and weight decay, and selects the
best on a held-out tenth of the training set. The test set is used once, at the end. Not from
the paper.

`linear.py:cached` computes the features of center crops once and trains probes on them in memory.
It also probes raw pixels and the random network, in seconds or minutes instead of hours. Not from
the paper.

The image sets, their size and normalization are inherited from pre-training unless given:
--config.eval.train=folder:DIR/train --config.eval.test=folder:DIR/val.
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors


def get_config(variant: str = 'lars') -> ConfigDict:
    if variant == 'cached':
        return config_lib.probe()
    config = config_lib.supervised()
    if variant in ('sgd', 'sweep'):
        config.optim.name = 'sgd'
        config.batch_size = 256
        config.optim.learning_rates = (30.0,)
    if variant == 'sweep':
        config.optim.learning_rates = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
        config.optim.weight_decays = (0.0, 1e-6, 1e-5)
        config.eval.holdout = 0.1
    elif variant not in ('lars', 'sgd'):
        raise errors.UserError(
            f'configs/linear.py has no variant {variant!r}; known: lars, sgd, sweep, cached'
        )
    return config
