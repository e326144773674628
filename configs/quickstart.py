"""SimSiam on scikit-learn's handwritten digits: real images, no download, two CPU cores.

1,797 images of 8x8 pixels, a fifth of them held out for kNN (k 20). A ResNet of three blocks learns
in about a minute. kNN on its features beats kNN on raw pixels and on its random initialization.
Not from the paper.

    python -m simsiam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

`quickstart.py:METHOD` trains simclr, moco_v2, byol or swav; `quickstart.py:swav,50ep` trains 50
epochs.
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors, method_defaults, variants


def get_config(variant: str = '') -> ConfigDict:
    words = variants.parse(variant, 'configs/quickstart.py')
    if words.source:
        raise errors.UserError(
            f'configs/quickstart.py trains on digits only; got {words.source}. '
            f'Use configs/folder.py:{words.source}'
        )
    config = config_lib.default()
    config.epochs = words.epochs or 200

    config.data.source = 'digits/train'
    config.data.channels = 1

    config.augment.size = 8
    config.augment.crop_scale = (0.6, 1.0)
    config.augment.crop_ratio = (0.9, 1.1)
    config.augment.rotation = 15.0
    config.augment.saturation = config.augment.hue = config.augment.gray = 0.0
    config.augment.flip = 0.0  # a mirrored digit is a different sign
    config.augment.mean = (0.0,)  # the background stays 0, like the padding
    config.augment.std = (0.38,)

    method_defaults.set_small(config, words.method)
    if words.method == 'swav':
        config.method.frozen_steps = 11  # an epoch

    config.eval.train = 'digits/train'
    config.eval.test = 'digits/test'
    config.eval.every_epochs = 50
    config.eval.resize = 0
    config.eval.k = 20
    config.eval.baselines = True

    config.checkpoint.every_epochs = 50
    config.log.every_steps = 110
    return config
