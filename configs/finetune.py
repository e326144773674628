"""Fine-tuning of all weights from a checkpoint, with all or a few of the labels.

    python -m simsiam_jax.main --config=configs/finetune.py --workdir=DIR --config.init_from=RUN
    python -m simsiam_jax.main --config=configs/finetune.py:10pct --workdir=DIR \
        --config.init_from=RUN

`finetune.py:10pct` and `:1pct` take that share of every class, the same images every time
(config.seed); of TFDS's ImageNet the field's own subsets, imagenet2012_subset, where they are
prepared. RUN may be a run's workdir or a PyTorch file of weights. --config.from_scratch=True
trains the same architecture from fresh weights: the baseline to beat.

SGD at batch 256 for 20 epochs, cosine; the rates of backbone and classifier with 10 % (0.01, 0.2)
and 1 % (0.02, 5) are those of SwAV's semi-supervised evaluation. Not from the paper, which
fine-tunes detectors only.

These figures are ImageNet's: a small set has few steps in 20 epochs and wants more of them and
higher rates (benchmarks/few_labels.py has digits').
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors

# labels -> rates of the backbone and of the classifier
_RATES = {1.0: (0.01, 0.2), 0.1: (0.01, 0.2), 0.01: (0.02, 5.0)}


def get_config(variant: str = '100pct') -> ConfigDict:
    errors.check_choice('the variant of configs/finetune.py', variant, ('100pct', '10pct', '1pct'))
    config = config_lib.supervised()
    config.task = 'finetune'
    config.label_fraction = int(variant.removesuffix('pct')) / 100
    config.batch_size = 256
    config.epochs = 20
    config.optim.name = 'sgd'
    config.optim.by_epoch = False
    config.optim.backbone_learning_rate, rate = _RATES[config.label_fraction]
    config.optim.learning_rates = (rate,)
    return config
