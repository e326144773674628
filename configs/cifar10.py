"""SimSiam on CIFAR-10 (appendix D): linear top-1 91.8%, kNN about 90% (paper).

CIFAR ResNet-18 (3x3 stem, no max-pool), 32 pixels, no blur, a projector of 2 layers, batch 512,
base rate 0.03, weight decay 5e-4, 800 epochs.

    python -m simsiam_jax.main --config=configs/cifar10.py --workdir=DIR

`cifar10.py:simclr` is the paper's comparison, linear top-1 91.1%, with temperature 0.5 as SimCLR
uses on CIFAR-10. `cifar10.py:moco_v2`, `:byol` and `:swav` are not from the paper: they keep data
and optimizer, with a queue, prototypes and heads for a small dataset. More words are separated by
commas: `cifar10.py:byol,200ep,folder:DIR` trains BYOL for 200 epochs on DIR/train and evaluates on
DIR/test, each with one subfolder per class. `npz:FILE.npz` takes the arrays train_images,
train_labels, test_images and test_labels of a file.

`cifar10.py:lightly` has the settings of the benchmark of lightly (PyTorch), to compare with its
published figures: the predictor's rate decays, the normalization is ImageNet's, kNN uses k 200 and
T 0.1. Its rate of 0.06 is that of base 0.03 at batch 512. Not from the paper.

`cifar10.py:small` is for a CPU: a network of three blocks with narrow heads, batch 128, crops from
0.5, and only the first 5,000 training and 2,000 test images. One epoch takes 10 to 20 seconds
on two cores. It shows which methods collapse and how they compare, not the paper's figures.
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors, method_defaults, variants


def get_config(variant: str = '') -> ConfigDict:
    given = variant.split(',')
    lightly, small = (word in given for word in ('lightly', 'small'))
    if lightly and small:
        raise errors.UserError('configs/cifar10.py has lightly or small; got both')
    others = ','.join(word for word in given if word not in ('lightly', 'small'))
    words = variants.parse(others, 'configs/cifar10.py', ('lightly', 'small'))
    method = words.method
    config = config_lib.default()
    config.epochs = words.epochs or (20 if small else 800)

    config.data.source = 'tfds:cifar10/train'

    config.augment.size = 32
    config.augment.blur = 0.0
    config.augment.mean = (0.4914, 0.4822, 0.4465)
    config.augment.std = (0.2470, 0.2435, 0.2616)

    config.model.name = 'resnet18'
    config.model.stem = 'cifar'

    method_defaults.set_method(config, method)
    if method in ('simsiam', 'simclr', 'swav'):
        config.method.projector_layers = 2
    if method == 'simclr':
        config.method.temperature = 0.5
    elif method == 'moco_v2':
        config.method.queue_size = 4096
        config.method.momentum = 0.99
    elif method == 'swav':
        config.method.prototypes = 100

    config.optim.learning_rate = 0.03
    config.optim.weight_decay = 5e-4

    config.eval.train = 'tfds:cifar10/train'
    config.eval.test = 'tfds:cifar10/test'
    if words.source:
        config.data.source = config.eval.train = f'{words.source}/train'
        config.eval.test = f'{words.source}/test'
    config.eval.resize = 0
    config.eval.baselines = True

    config.checkpoint.every_epochs = 10
    if lightly:
        config.augment.mean = (0.485, 0.456, 0.406)
        config.augment.std = (0.229, 0.224, 0.225)
        config.optim.predictor_schedule = 'decayed'
        config.eval.k = 200
        config.eval.temperature = 0.1
    elif small:
        method_defaults.set_small(config, method)
        if method == 'moco_v2':
            config.method.queue_size = 4096  # of 5,000 images
        elif method == 'swav':
            config.method.frozen_steps = 39  # an epoch
        config.augment.crop_scale = (0.5, 1.0)
        config.eval.k = 20
        config.eval.every_epochs = 2
        if not words.source.startswith('folder:'):
            config.data.source = config.eval.train = f'{config.data.source}[:5000]'
            config.eval.test = f'{config.eval.test}[:2000]'
    return config
