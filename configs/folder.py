"""SimSiam on a folder of your own images, labels not needed.

The paper's recipe at batch 256, which one GPU holds, with ResNet-50 and 224 pixels. Not a setting
of the paper: it trained on ImageNet only.

    python -m simsiam_jax.main --config=configs/folder.py --workdir=DIR \
        --config.data.source=folder:/data/images

JPEG, PNG, BMP, GIF, WebP, TIFF and .npy; mean and std are measured on a sample. Grayscale
images: --config.data.channels=1, multi-channel ones (TIFF, .npy) their number. Few images want
more epochs, small ones a smaller --config.augment.size and --config.model.stem=cifar. With
labeled folders (one subfolder a class) kNN accuracy is measured along the way:
--config.eval.train=folder:/data/labeled/train --config.eval.test=folder:/data/labeled/test.
`python -m simsiam_jax.tools.doctor` with the same arguments says what of this fits your images.
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.batch_size = 256
    config.epochs = 200

    config.data.source = 'folder:'
    config.data.normalize = 'auto'

    config.eval.train = ''
    config.eval.test = ''
    config.eval.k = 20

    config.log.every_steps = 10
    return config
