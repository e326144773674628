"""Fine-tuning of all weights from a checkpoint, with all or a share of the labels.

    python -m simsiam_jax.main --config=configs/finetune.py --workdir=DIR --config.init_from=RUN
    python -m simsiam_jax.main --config=configs/finetune.py:10pct --workdir=DIR \
        --config.init_from=RUN

`finetune.py:10pct` and `:1pct` use that share of every class, the same images for the same
config.seed. For TFDS's ImageNet they use the standard subsets of imagenet2012_subset if prepared.
RUN is a run's workdir or a PyTorch file of weights. --config.from_scratch=True trains the same
architecture from fresh weights: the baseline to beat.

SGD at batch 256 for 20 epochs, cosine. The rates of backbone and classifier with 10% (0.01, 0.2)
and 1% (0.02, 5) are from SwAV's semi-supervised evaluation. Not from the paper, which
fine-tunes detectors only.

These values are for ImageNet. A small dataset has few steps in 20 epochs and needs more epochs and
higher rates (benchmarks/few_labels.py has them for digits).
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors

# Label fraction -> rates of the backbone and of the classifier.
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
