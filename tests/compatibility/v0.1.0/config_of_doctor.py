"""simsiam on digits/train.

Written by simsiam_jax.tools.doctor from configs/quickstart.py. Not a setting of the paper.

    python -m simsiam_jax.main --config=/tmp/compat/out/config_of_doctor.py --workdir=DIR

Look at DIR/views.png first. What no look at pixels tells: where a mirrored image is another thing
(digits, letters), set config.augment.flip = 0.0; where colour or brightness is what tells images
apart, lower config.augment.jitter.
"""

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    # As in configs/quickstart.py.
    config.augment.blur = 0.0
    config.augment.crop_ratio = (0.9, 1.1)
    config.augment.crop_scale = (0.6, 1.0)
    config.augment.flip = 0.0
    config.augment.gray = 0.0
    config.augment.hue = 0.0
    config.augment.mean = (0.0,)
    config.augment.rotation = 15.0
    config.augment.saturation = 0.0
    config.augment.size = 8
    config.augment.std = (0.38,)
    config.batch_size = 128
    config.checkpoint.every_epochs = 50.0
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = 1.0
    config.data.channels = 1
    config.data.source = 'digits/train'
    config.eval.baselines = True
    config.eval.every_epochs = 50
    config.eval.k = 20
    config.eval.resize = 0
    config.eval.test = 'digits/test'
    config.eval.train = 'digits/train'
    config.log.every_steps = 110
    config.method.dim = 128
    config.method.predictor_width = 32
    config.method.projector_width = 16
    config.model.dtype = 'float32'
    config.model.name = 'resnet18'
    config.model.stages = (1, 1, 1)
    config.model.stem = 'cifar'
    config.model.width_multiplier = 0.25
    config.model.zero_init_residual = False
    config.optim.accumulate = 2
    config.optim.final = 0.01
    config.optim.learning_rate = 0.8
    config.optim.predictor = 'decayed'
    config.optim.warmup_start = 0.5
    config.optim.weight_decay = 0.0005
    config.small_views.number = 1
    config.small_views.size = 8

    # What fits these images and this machine.
    # configs/quickstart.py's; more help, if there is time
    config.epochs = 200
    return config
