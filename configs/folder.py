"""SimSiam on a folder of your own images, without labels.

The paper's recipe with ResNet-50 and 224 pixels at batch 256, which fits on one GPU.
Not a setting of the paper, which trains on ImageNet only.

    python -m simsiam_jax.main --config=configs/folder.py --workdir=DIR \
        --config.data.source=folder:/data/images

Comma-separated words after a colon set the images, the number of epochs and the method (simclr,
moco_v2, byol, swav): `folder.py:folder:/data/images,byol,100ep`.

docs/guides/data.md lists formats and sources; mean and std are measured on a sample. For grayscale
images set --config.data.channels=1, for multi-channel images (TIFF, .npy) their number of channels.
A small dataset needs more epochs; small images need a smaller --config.augment.size and
--config.model.stem=cifar. Labeled folders (one subfolder per class) add kNN evaluation:
--config.eval.train=folder:/data/labeled/train --config.eval.test=folder:/data/labeled/test.
`python -m simsiam_jax.tools.doctor` with the same arguments recommends settings for your images.
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import method_defaults, variants


def get_config(variant: str = '') -> ConfigDict:
    words = variants.parse(variant, 'configs/folder.py')
    config = config_lib.default()
    config.batch_size = 256
    config.epochs = words.epochs or 200
    method_defaults.set_method(config, words.method)

    config.data.source = words.source or 'folder:'
    config.data.normalize = 'auto'

    config.eval.train = ''
    config.eval.test = ''
    config.eval.k = 20
    config.eval.baselines = True

    config.log.every_steps = 10
    return config
