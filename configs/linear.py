"""Linear evaluation of a checkpoint: the paper's protocol, frozen backbone, 90 epochs.

    python -m simsiam_jax.main --config=configs/linear.py --workdir=DIR --config.init_from=RUN

`linear.py:lars` (the same) is LARS at batch 4096, base rate 0.1 as in the official code; the
paper says 0.02: --config.optim.learning_rates='(0.02,)'. Paper: 68.1 % after the baseline of
configs/imagenet.py. `linear.py:sgd`: SGD at batch 256, rate 30, about a point lower.

`linear.py:sweep` trains many heads at once, rates times weight decays, and chooses on a tenth of
the training set, which is held out; the test set is used once, at the end. Not from the paper.

`linear.py:cached` computes the features of center crops once and probes them in memory, beside
raw pixels and the random network: minutes instead of hours. Not from the paper.

The image sets, their size and normalization are those of the pre-training where they are not
given: --config.eval.train=folder:DIR/train --config.eval.test=folder:DIR/val.
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
            f'configs/linear.py knows no variant {variant!r}; known: lars, sgd, sweep, cached'
        )
    return config
