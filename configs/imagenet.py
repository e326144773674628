"""SimSiam's ImageNet baseline: linear top-1 68.1% after 100 epochs (paper).

ResNet-50, 224 pixels, batch 512, base rate 0.05, constant rate for the predictor.

    python -m simsiam_jax.main --config=configs/imagenet.py --workdir=DIR

reads TFDS's imagenet2012 in array_record files. Comma-separated words after a colon change the
number of epochs, the method, and the images: a folder with train/ and val/, each with one subfolder
per class, as in PyTorch:

    python -m simsiam_jax.main --config=configs/imagenet.py:byol,200ep,folder:/data/imagenet \
        --workdir=DIR

The methods are the paper's reproductions (Table 4, linear top-1 in %, results of the paper):

    method    batch  100ep  200ep  400ep  800ep
    simsiam     256   68.1   70.0   70.8   71.3   (--config.batch_size=256)
    simclr     4096   66.5   68.3   69.8   70.4
    moco_v2     256   67.4   69.9   71.0   72.2
    byol       4096   66.5   70.6   73.2   74.3
    swav       4096   66.5   69.1   70.7   71.8

BYOL's rate, weight decay and momentum depend on the number of epochs. Set it by a word, such as
800ep, because --config.epochs does not change these values.
For SimSiam at batch 1024 and above the paper uses warm-up: --config.optim.warmup_epochs=10.
SwAV's multi-crop works with any method and adds six views of 96 pixels:
--config.augment.crop_scale=0.14,1.0 --config.local_crops.number=6.
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import method_defaults, variants


def get_config(variant: str = '') -> ConfigDict:
    config = config_lib.default()  # the baseline itself
    # As PyTorch reads ImageNet, and nothing to measure before the first step.
    config.data.range, config.data.orientation = 'dtype', False
    words = variants.parse(variant, 'configs/imagenet.py')
    config.epochs = words.epochs or config.epochs
    if words.source:
        config.data.source = config.eval.train = f'{words.source}/train'
        config.eval.test = f'{words.source}/val'
    method_defaults.set_method(config, words.method)
    METHODS[words.method](config)
    return config


def simsiam(config: ConfigDict) -> None:
    """Keeps the baseline."""


def moco_v2(config: ConfigDict) -> None:
    config.batch_size = 256
    config.optim.learning_rate = 0.03


def large_batch(config: ConfigDict) -> None:
    """Sets what SimCLR, BYOL and SwAV share; their crops start from 0.08 of the area."""
    config.batch_size = 4096
    config.optim.name = 'lars'
    config.optim.learning_rate = 0.3
    config.optim.weight_decay = 1e-6
    config.optim.exclude_bn_bias = True
    config.optim.warmup_epochs = 10
    config.optim.by_epoch = False
    config.augment.crop_scale = (0.08, 1.0)


def strong_jitter(config: ConfigDict) -> None:
    config.augment.brightness = config.augment.contrast = config.augment.saturation = 0.8
    config.augment.hue = 0.2


def simclr(config: ConfigDict) -> None:
    large_batch(config)
    strong_jitter(config)


def byol(config: ConfigDict) -> None:
    """Sets one of three schedules: for 100 epochs, 200 to 400, or 800."""
    large_batch(config)
    config.update_from_flattened_dict(method_defaults.byol_schedule(config.epochs))
    config.augment.saturation = 0.2
    config.augment.blur = 1.0
    config.second_view.blur = 0.1
    config.second_view.solarize = 0.2


def swav(config: ConfigDict) -> None:
    """Sets rate 4.8 at batch 4096, warmed up from 0.3, down to 0.0048, and SwAV's own jitter."""
    large_batch(config)
    strong_jitter(config)
    config.optim.exclude_bn_bias = False
    config.optim.warmup_start_fraction = 0.3 / 4.8
    config.optim.final_lr_fraction = 0.0048 / 4.8


METHODS = {
    'simsiam': simsiam,
    'simclr': simclr,
    'moco_v2': moco_v2,
    'byol': byol,
    'swav': swav,
}
