"""Every key of a run, with its default: SimSiam's ImageNet baseline, and its evaluations."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from simsiam_jax import errors


class _Config(ConfigDict):
    """A configuration whose sections can still be read by the names of version 0.1.0."""

    def __getitem__(self, key: str) -> Any:
        if key == 'small_views':
            errors.warn_once('config.small_views is now config.local_crops')
            key = 'local_crops'
        return super().__getitem__(key)


def default() -> ConfigDict:
    """The configuration that configs/*.py change."""
    config = _Config()
    config.task = 'pretrain'
    config.seed = 0
    config.batch_size = 512  # global, all devices of all hosts
    config.epochs = 100
    config.init_from = ''  # weights to start from: a run's workdir, .pth, .safetensors, .msgpack
    config.guard = 'warn'  # where the training collapses (training/guard.py); or stop, off
    config.dry_run = False  # build, print shapes, parameters and memory, stop
    config.profile = ''  # START:STOP, steps to trace into WORKDIR/profile
    config.debug_nans = False  # check every step; a traceback to the operation that gives NaN

    config.data = ConfigDict()
    config.data.source = 'tfds:imagenet2012/train'
    config.data.tfds_data_dir = ''  # '': TFDS's own default
    config.data.channels = 3
    config.data.on_device = 'color'  # what is left to the device: none, color, all (data/host.py)
    config.data.canvas = 512  # with 'all': images are sent in squares of so many pixels
    config.data.backend = 'auto'  # host: tf.data; resident: whole on the device; auto: if it fits
    config.data.resident_limit = 2**28  # bytes of all images, which must be equal in size
    config.data.normalize = 'given'  # augment.mean and std; 'auto': measured on a sample
    config.data.max_bad_fraction = 0.01  # of the images may be unreadable

    config.augment = ConfigDict()  # data/recipe.py says what each is
    config.augment.size = 224
    config.augment.crop_scale = (0.2, 1.0)
    config.augment.crop_ratio = (3 / 4, 4 / 3)
    config.augment.rotation = 0.0
    config.augment.jitter = 0.8
    config.augment.brightness = 0.4
    config.augment.contrast = 0.4
    config.augment.saturation = 0.4
    config.augment.hue = 0.1
    config.augment.gray = 0.2
    config.augment.blur = 0.5
    config.augment.blur_sigma = (0.1, 2.0)
    config.augment.solarize = 0.0
    config.augment.flip = 0.5
    config.augment.mean = (0.485, 0.456, 0.406)
    config.augment.std = (0.229, 0.224, 0.225)

    config.second_view = ConfigDict()  # keys of augment that are others in the second view

    config.local_crops = ConfigDict()  # multi-crop: views beside the two, as augment but for these
    config.local_crops.number = 0
    config.local_crops.size = 96
    config.local_crops.crop_scale = (0.05, 0.14)

    config.model = ConfigDict()  # models/resnet.py
    config.model.name = 'resnet50'
    config.model.stem = 'imagenet'
    config.model.width_multiplier = 1.0
    config.model.stages = ()  # (): the name's own
    config.model.zero_init_residual = True
    config.model.dtype = 'bfloat16'
    config.model.kernels = 'auto'  # models/kernels.py: plain, or fused for GPUs
    config.model.remat = False  # compute residual blocks again in the backward pass: less memory

    config.method = ConfigDict()  # methods/NAME.py
    config.method.name = 'simsiam'
    config.method.dim = 2048
    config.method.projector_layers = 3
    config.method.projector_hidden_dim = 0  # 0: dim
    config.method.projector_hidden_bn = True
    config.method.projector_output_bn = True
    config.method.projector_output_affine = False
    config.method.predictor_hidden_dim = 512
    config.method.predictor_hidden_bn = True
    config.method.predictor_output_bn = False
    config.method.predictor = True
    config.method.stop_gradient = True
    config.method.similarity = 'cosine'  # or cross_entropy
    config.method.pairs = 'symmetric'  # or asymmetric, two_asymmetric
    config.method.momentum = 0.0  # of the target; 0: there is none

    config.optim = ConfigDict()  # training/optim.py
    config.optim.name = 'sgd'  # or lars
    config.optim.learning_rate = 0.05  # times batch_size/256
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.exclude_bn_bias = False  # from the weight decay, and from LARS's scaling
    config.optim.warmup_epochs = 0  # 10 for batch 1024 and above
    config.optim.warmup_start_fraction = 0.0  # share of the rate that the warm-up starts from
    config.optim.final_lr_fraction = 0.0  # share of the rate that the cosine ends at
    config.optim.by_epoch = True
    config.optim.predictor_schedule = 'constant'  # its rate: constant, decayed, fixed (at 0)
    config.optim.gradient_accumulation_steps = (
        1  # the batch in so many parts, one after the other: less memory
    )

    config.alternate = ConfigDict()  # training/alternation.py
    config.alternate.steps = 1  # with targets of the same weights; 1: SimSiam, 0: an epoch
    config.alternate.dtype = 'float32'  # of the targets on the host, or bfloat16

    config.eval = ConfigDict()  # the kNN monitor
    config.eval.train = 'tfds:imagenet2012/train'  # '': no monitor
    config.eval.test = 'tfds:imagenet2012/validation'
    config.eval.every_epochs = 10
    config.eval.batch_size = 512
    config.eval.resize = 256  # the shorter side before the center crop; 0: no resize, no crop
    config.eval.k = 200
    config.eval.temperature = 0.2
    config.eval.baselines = False  # also raw pixels and the network at initialization

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1.0  # may be a part of one
    config.checkpoint.max_to_keep = 2
    config.checkpoint.keep_period = 0.0  # also those of every so many epochs for good; 0: none

    config.log = ConfigDict()
    config.log.every_steps = 50
    config.log.tensorboard = True
    config.log.report = True  # draw WORKDIR/report.html at the end
    config.log.wandb = ''  # a project of Weights & Biases; '': none
    config.log.mlflow = ''  # an experiment of MLflow; '': none
    return config


def _judged(task: str) -> ConfigDict:
    """What all evaluations have. Keys that are None are as the checkpoint was trained."""
    config = ConfigDict()
    config.task = task
    config.init_from = ''  # the workdir of a run, or a file of weights
    config.seed = 0
    config.label_fraction = 1.0  # share of the training set's labels to use, class-balanced

    config.data = ConfigDict()
    config.data.tfds_data_dir = placeholder(str)
    config.data.channels = placeholder(int)
    config.data.backend = 'auto'
    config.data.resident_limit = 2**28
    config.data.max_bad_fraction = 0.01

    config.augment = ConfigDict()
    config.augment.size = placeholder(int)
    config.augment.mean = placeholder(tuple)
    config.augment.std = placeholder(tuple)

    config.eval = ConfigDict()
    config.eval.train = placeholder(str)  # labeled images
    config.eval.test = placeholder(str)
    config.eval.resize = placeholder(int)
    config.eval.batch_size = 512
    return config


def knn() -> ConfigDict:
    """The configuration of task knn."""
    config = _judged('knn')
    config.eval.k = (10, 20, 100, 200)
    config.eval.temperature = (0.07, 0.1, 0.2)
    config.eval.bank_dtype = 'float16'
    return config


def probe() -> ConfigDict:
    """The configuration of task probe: classifiers on cached features."""
    config = _judged('probe')
    config.batch_size = 256
    config.epochs = 100
    config.eval.holdout = 0.2  # of the training set, to choose by
    config.eval.baselines = True  # also raw pixels and the network at initialization

    config.optim = ConfigDict()  # the heads: every rate (times batch_size/256) with every decay
    config.optim.learning_rates = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    config.optim.weight_decays = (0.0, 1e-5, 1e-4)
    config.optim.momentum = 0.9

    config.logistic = ConfigDict()  # by L-BFGS
    config.logistic.strengths = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # C of scikit-learn; (): none
    config.logistic.limit = 2**27  # features of all training images, above it is left out
    return config


def supervised() -> ConfigDict:
    """The configuration of tasks linear and finetune: a classifier trained on images."""
    config = _judged('linear')
    config.from_scratch = False  # the architecture of init_from with fresh weights: the baseline
    config.batch_size = 4096
    config.epochs = 90
    config.data.on_device = 'color'
    config.data.canvas = 512
    config.eval.holdout = 0.0  # share of the training set to watch and choose by
    config.eval.every_epochs = 10  # where there is one

    ours = default()
    ours.augment.update({'size': None, 'mean': None, 'std': None})
    config.augment = ConfigDict(ours.augment.to_dict() | config.augment.to_dict())
    config.augment.crop_scale = (0.08, 1.0)
    config.augment.jitter = config.augment.gray = config.augment.blur = 0.0

    config.optim = ConfigDict()
    config.optim.name = 'lars'
    config.optim.learning_rates = (0.1,)  # times batch_size/256; a head for each with each decay
    config.optim.weight_decays = (0.0,)
    config.optim.backbone_learning_rate = 0.0  # of finetune; linear leaves the backbone alone
    config.optim.backbone_weight_decay = 0.0
    config.optim.momentum = 0.9
    config.optim.warmup_epochs = 0
    config.optim.by_epoch = True
    config.optim.gradient_accumulation_steps = (
        1  # the batch in so many parts, one after the other: less memory
    )

    config.profile, config.debug_nans = ours.profile, ours.debug_nans
    config.checkpoint = ours.checkpoint
    config.log = ours.log
    return config


DEFAULTS = {
    'pretrain': default,
    'linear': supervised,
    'finetune': supervised,
    'probe': probe,
    'knn': knn,
}
