"""SimSiam on ImageNet, the paper's baseline: linear top-1 68.1 % after 100 epochs (the paper's).

ResNet-50, 224 pixels, batch 512, base rate 0.05, the predictor's rate constant. After 200, 400
and 800 epochs the paper has 70.0, 70.8 and 71.3 % (batch 256, Table 4).

    python -m simsiam_jax.main --config=configs/imagenet.py --workdir=DIR
    python -m simsiam_jax.main --config=configs/imagenet.py:200ep --workdir=DIR \
        --config.batch_size=256

reads TFDS's imagenet2012 in array_record files; a folder with train/ and val/ of one subfolder
a class, as PyTorch users have it, is

    python -m simsiam_jax.main --config=configs/imagenet.py:folder:/data/imagenet --workdir=DIR

and both at once `imagenet.py:200ep,folder:/data/imagenet`. For a batch of 1024 and above the
paper warms up: --config.optim.warmup_epochs=10.
"""

import re

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors


def get_config(variant: str = '') -> ConfigDict:
    config = config_lib.default()  # the baseline itself
    for word in filter(None, variant.split(',')):
        if match := re.fullmatch(r'(\d+)ep', word):
            config.epochs = int(match[1])
        elif word.startswith('folder:'):
            config.data.source = config.eval.train = f'{word}/train'
            config.eval.test = f'{word}/val'
        else:
            raise errors.UserError(
                f'configs/imagenet.py knows no variant {word!r}; known: 200ep (any number), '
                'folder:DIR'
            )
    return config
