"""Every key of a run, with its default: SimSiam's ImageNet baseline, and its evaluations.

Comments give effect and unit; choices are listed as `a | b | c`.
"""

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


def inherited(kind: type) -> Any:
    """Returns None for a key of this type, which an evaluation inherits from its checkpoint."""
    return placeholder(kind)


def resize_of(size: int) -> int:
    """Returns the default of eval.resize: small images are evaluated whole, others as the paper's.

    Args:
      size: Side of the views, pixels.
    """
    return size if size <= 64 else round(size * 256 / 224)


def default() -> ConfigDict:
    """Returns the configuration of task pretrain, which the files of configs/ change.

    Learning rates are base rates, times batch_size/256.
    """
    config = _Config()
    config.task = 'pretrain'  # pretrain | linear | finetune | probe | knn
    config.seed = 0  # seed of the initialization, the order of images and their augmentation
    config.batch_size = 512  # images in a step, over all devices of all hosts
    config.epochs = 100  # passes through the training images
    config.init_from = ''  # initial weights: workdir | .pth | .safetensors | .msgpack; '' disables
    config.guard = 'warn'  # action on a collapse (training/guard.py): warn | stop | off
    config.dry_run = False  # build, print shapes, parameters and memory, then exit
    config.profile = ''  # steps START:STOP to trace into WORKDIR/profile; '' disables
    config.merge_views = False  # views of one size as one batch, each with BN of its own
    config.deterministic = False  # the same bits in every start on a GPU; slower
    config.debug_nans = False  # check every step; the traceback shows the operation that gives NaN

    config.data = ConfigDict()
    config.data.source = 'tfds:imagenet2012/train'  # images: folder:DIR | files:LIST | zip:FILE |
    # tar:FILE | parquet:FILE | npz:FILE/NAME | npy:FILES | tfds:NAME/SPLIT | digits/SPLIT
    config.data.include = ''  # patterns of files to use: '*.jpg,*/Imgs/*'; '' uses all images
    config.data.exclude = ''  # patterns of files to leave out: '*_mask.*,GT'; '' leaves out none
    config.data.tfds_data_dir = ''  # folder of TFDS's datasets; '' uses TFDS's own default
    config.data.channels = 3  # channels of the images
    config.data.range = 'auto'  # what becomes 0 to 255 in images of other types than 8 bits:
    # auto (percentiles of a sample) | dtype | low,high[,low,high of the next channel...]
    config.data.orientation = True  # apply the EXIF orientation
    config.data.background = (0,)  # color behind transparent pixels, 0 to 255; () ignores alpha
    config.data.on_device = 'color'  # augmentations on the accelerator: none | color | all
    config.data.canvas = 512  # side of the images sent with on_device=all, pixels
    config.data.backend = 'auto'  # host (threads) | resident (on the device) | auto (if it fits)
    config.data.resident_limit = 2**28  # most bytes of all images, equal in size, for resident
    config.data.normalize = 'given'  # given (augment.mean and std) | auto (measured on a sample)
    config.data.max_bad_fraction = 0.01  # share of unreadable images above which the run stops
    config.data.retry_seconds = 300.0  # longest time to wait for storage that fails; 0 disables
    config.data.accept_changed = False  # resume although the images are others than before

    config.augment = ConfigDict()  # augmentation of the views; data/recipe.py
    config.augment.size = 224  # side of a view, pixels
    config.augment.crop_scale = (0.2, 1.0)  # range of the crop's share of the image's area
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # range of the crop's width/height
    config.augment.rotation = 0.0  # largest angle before the crop, degrees; 0 disables
    config.augment.jitter = 0.8  # probability of the four color operations; 0 disables
    config.augment.brightness = 0.4  # x: factor from U[max(0, 1 - x), 1 + x]; 0 disables
    config.augment.contrast = 0.4  # x: factor from U[max(0, 1 - x), 1 + x]; 0 disables
    config.augment.saturation = 0.4  # x: factor from U[max(0, 1 - x), 1 + x]; 0 disables
    config.augment.hue = 0.1  # x: shift from U[-x, x], turns; 0 disables
    config.augment.gray = 0.2  # probability of grayscale; 0 disables
    config.augment.blur = 0.5  # probability of a Gaussian blur; 0 disables
    config.augment.blur_sigma = (0.1, 2.0)  # range of the blur's sigma, pixels
    config.augment.solarize = 0.0  # probability of solarization (BYOL); 0 disables
    config.augment.flip = 0.5  # probability of a horizontal flip; 0 disables
    config.augment.mean = (0.485, 0.456, 0.406)  # mean by channel, of values in [0, 1]
    config.augment.std = (0.229, 0.224, 0.225)  # std by channel, of values in [0, 1]

    config.second_view = ConfigDict()  # keys of augment that differ in the second view

    config.local_crops = ConfigDict()  # multi-crop: more views; other keys as in augment
    config.local_crops.number = 0  # views beside the two large ones; 0 disables
    config.local_crops.size = 96  # side of a local crop, pixels
    config.local_crops.crop_scale = (0.05, 0.14)  # range of the crop's share of the image's area

    config.model = ConfigDict()  # backbone; models/backbones.py
    config.model.name = 'resnet50'  # resnet18 | resnet34 | resnet50 | resnet101 | resnet152 |
    # vit_tiny | vit_small | vit_base | convnext_atto | convnext_femto | convnext_pico |
    # convnext_nano | convnext_tiny | PACKAGE.MODULE:FUNCTION, a function that returns a network
    config.model.arguments = ConfigDict()  # of all networks but ResNets, such as patch_size
    config.model.stem = 'imagenet'  # ResNets: imagenet (7x7, max-pool) | cifar (3x3)
    config.model.width_multiplier = 1.0  # ResNets: factor on the channels of all stages
    config.model.stages = ()  # ResNets: blocks of each stage; () uses the numbers of model.name
    config.model.zero_init_residual = True  # ResNets: the last BN scale of every block starts at 0
    config.model.dtype = 'bfloat16'  # type of the computation: bfloat16 | float32
    config.model.kernels = 'auto'  # models/kernels.py: plain | fused (for GPUs) | auto
    config.model.remat = False  # recompute blocks in the backward pass: less memory

    config.method = ConfigDict()  # arguments of methods/NAME.py, here of simsiam
    config.method.name = 'simsiam'  # simsiam | simclr | moco_v2 | byol | swav | moving_average
    config.method.dim = 2048  # width of z and p
    config.method.projector_layers = 3  # fully connected layers of the projector
    config.method.projector_hidden_dim = 0  # width of the projector's hidden layers; 0 uses dim
    config.method.projector_hidden_bn = True  # BN in the projector's hidden layers
    config.method.projector_output_bn = True  # BN on z
    config.method.projector_output_affine = False  # scale and bias in the BN on z
    config.method.predictor_hidden_dim = 512  # width of the predictor's hidden layer
    config.method.predictor_hidden_bn = True  # BN in the predictor's hidden layer
    config.method.predictor_output_bn = False  # BN on p
    config.method.predictor = True  # False: p is z, which collapses
    config.method.stop_gradient = True  # no gradient through the target; False collapses
    config.method.similarity = 'cosine'  # cosine | cross_entropy
    config.method.pairs = 'symmetric'  # terms of the loss: symmetric | asymmetric | two_asymmetric
    config.method.momentum = 0.0  # EMA momentum of the target network; 0 disables

    config.optim = ConfigDict()  # training/optim.py
    config.optim.name = 'sgd'  # sgd | lars | adamw | PACKAGE.MODULE:FUNCTION, such as optax:lion
    config.optim.arguments = ConfigDict()  # of all optimizers but sgd and lars, such as b2
    config.optim.learning_rate = 0.05  # base rate
    config.optim.momentum = 0.9  # momentum of the gradient, adamw's b1; 0 disables
    config.optim.weight_decay = 1e-4  # factor of the weights in the gradient; 0 disables
    config.optim.exclude_bn_bias = False  # sgd, lars: no decay and no scaling of BN and biases
    config.optim.warmup_epochs = 0  # epochs of linear warm-up, 10 from batch 1024; 0 disables
    config.optim.warmup_start_fraction = 0.0  # share of the rate at the start of the warm-up
    config.optim.final_lr_fraction = 0.0  # share of the rate at the end of the cosine
    config.optim.by_epoch = True  # the cosine changes every epoch; False: every step
    config.optim.predictor_schedule = 'constant'  # predictor's rate: constant | decayed | fixed
    config.optim.gradient_accumulation_steps = 1  # parts of a batch; more lowers memory use

    config.alternate = ConfigDict()  # training/alternation.py
    config.alternate.steps = 1  # steps on targets of the same weights; 1 is SimSiam, 0 an epoch
    config.alternate.dtype = 'float32'  # type of the targets on the host: float32 | bfloat16

    config.eval = ConfigDict()  # kNN during training
    config.eval.train = 'tfds:imagenet2012/train'  # labeled images of the bank; '' disables both
    config.eval.test = 'tfds:imagenet2012/validation'  # labeled images to classify
    config.eval.split = 0.0  # share of train (or else of data.source) held out as test; 0 disables
    config.eval.every_epochs = 10  # epochs between evaluations; 0 disables
    config.eval.batch_size = 512  # images, over all devices
    config.eval.resize = inherited(int)  # shorter side before the center crop, pixels; 0 disables
    # both; None follows augment.size, see resize_of
    config.eval.k = 200  # neighbors
    config.eval.temperature = 0.2  # temperature of the neighbors' votes
    config.eval.bank_dtype = 'float32'  # type of the bank of features: float32 (exact) | float16
    config.eval.baselines = False  # evaluate raw pixels and the random initialization too

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1.0  # epochs between checkpoints, or fractions; 0: at the end
    config.checkpoint.max_to_keep = 2  # latest checkpoints to keep
    config.checkpoint.keep_period = 0.0  # epochs between checkpoints kept for good; 0 disables

    config.log = ConfigDict()
    config.log.every_steps = 50  # steps between points of the curves; a short run has ten points
    config.log.tensorboard = True  # write TensorBoard events
    config.log.report = True  # write WORKDIR/report.html at the end
    config.log.wandb = ''  # project of Weights & Biases; '' disables
    config.log.mlflow = ''  # experiment of MLflow; '' disables
    return config


def _evaluation(task: str) -> ConfigDict:
    """Returns the keys of all evaluations; None inherits from the checkpoint."""
    config = ConfigDict()
    config.task = task
    config.init_from = ''  # checkpoint to evaluate: workdir | .pth | .safetensors | .msgpack
    config.seed = 0  # seed of the heads, the order of images and the parts of the training set
    config.label_fraction = 1.0  # share of the training set's labels to use, class-balanced

    config.data = ConfigDict()
    config.data.include = inherited(str)  # patterns of files to use; '' uses all; None inherits
    config.data.exclude = inherited(str)  # patterns to leave out; '' disables; None inherits
    config.data.tfds_data_dir = inherited(str)  # folder of TFDS's datasets; None inherits
    config.data.channels = inherited(int)  # channels of the images; None inherits
    config.data.range = inherited(str)  # values that become 0 to 255; None inherits
    config.data.orientation = inherited(bool)  # apply the EXIF orientation; None inherits
    config.data.background = inherited(tuple)  # color behind transparent pixels; None inherits
    config.data.backend = 'auto'  # host (threads) | resident (on the device) | auto (if it fits)
    config.data.resident_limit = 2**28  # most bytes of all images, equal in size, for resident
    config.data.max_bad_fraction = 0.01  # share of unreadable images above which the run stops
    config.data.retry_seconds = 300.0  # longest time to wait for storage that fails; 0 disables

    config.augment = ConfigDict()
    config.augment.size = inherited(int)  # side of an image, pixels; None inherits
    config.augment.mean = inherited(tuple)  # mean by channel, of values in [0, 1]; None inherits
    config.augment.std = inherited(tuple)  # std by channel, of values in [0, 1]; None inherits

    config.eval = ConfigDict()
    config.eval.train = inherited(str)  # labeled images to learn from; None inherits
    config.eval.test = inherited(str)  # labeled images to test on; None inherits
    config.eval.split = 0.0  # share of train (or else of data.source) held out as test; 0 disables
    config.eval.resize = inherited(int)  # shorter side, pixels; 0 disables; None inherits
    config.eval.batch_size = 512  # images, over all devices
    return config


def knn() -> ConfigDict:
    """Returns the configuration of task knn."""
    config = _evaluation('knn')
    config.eval.k = (10, 20, 100, 200)  # neighbors; each with each temperature
    config.eval.temperature = (0.07, 0.1, 0.2)  # temperature of the neighbors' votes
    config.eval.baselines = True  # evaluate raw pixels and the random initialization too
    config.eval.bank_dtype = 'float16'  # type of the bank of features: float16 | float32 (exact)
    return config


def probe() -> ConfigDict:
    """Returns the configuration of task probe: classifiers on cached features."""
    config = _evaluation('probe')
    config.batch_size = 256  # features in a step
    config.epochs = 100  # passes through the features
    config.eval.holdout = 0.2  # share of the training set held out to choose the head
    config.eval.baselines = True  # evaluate raw pixels and the random initialization too

    config.optim = ConfigDict()  # a head for each learning rate with each weight decay
    config.optim.learning_rates = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # base; () disables
    config.optim.weight_decays = (0.0, 1e-5, 1e-4)  # factors of the weights in the gradient
    config.optim.momentum = 0.9  # momentum of the gradient; 0 disables

    config.logistic = ConfigDict()  # logistic regression by L-BFGS; strengths () disables
    config.logistic.strengths = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # scikit-learn's C
    config.logistic.limit = 2**27  # most values of training features on a CPU; if there are more, a
    # class-balanced sample is fitted; 0 disables
    config.logistic.accelerator_limit = 2**32  # as limit, on an accelerator
    return config


def supervised() -> ConfigDict:
    """Returns the configuration of tasks linear and finetune: a classifier trained on images."""
    config = _evaluation('linear')
    config.from_scratch = False  # fresh weights in init_from's architecture: the baseline
    config.batch_size = 4096  # images in a step, over all devices of all hosts
    config.epochs = 90  # passes through the training images
    config.data.on_device = 'color'  # augmentations on the accelerator: none | color | all
    config.data.canvas = 512  # side of the images sent with on_device=all, pixels
    config.data.accept_changed = False  # resume although the images are others than before
    config.eval.holdout = 0.0  # share of the training set held out to choose the head; 0 disables
    config.eval.every_epochs = 10  # epochs between evaluations on the held-out images; 0 disables

    ours = default()
    ours.augment.update({'size': None, 'mean': None, 'std': None})
    config.augment = ConfigDict(ours.augment.to_dict() | config.augment.to_dict())
    config.augment.crop_scale = (0.08, 1.0)
    config.augment.jitter = config.augment.gray = config.augment.blur = 0.0

    config.optim = ConfigDict()  # a head for each learning rate with each weight decay
    config.optim.name = 'lars'  # sgd | lars | adamw | PACKAGE.MODULE:FUNCTION
    config.optim.arguments = ConfigDict()  # of all optimizers but sgd and lars, such as b2
    config.optim.learning_rates = (0.1,)  # base rates of the heads
    config.optim.weight_decays = (0.0,)  # factors of the weights in the gradient
    config.optim.backbone_learning_rate = 0.0  # base rate of the backbone in finetune; 0 disables
    config.optim.backbone_weight_decay = 0.0  # factor of its weights in the gradient; 0 disables
    config.optim.momentum = 0.9  # momentum of the gradient; 0 disables
    config.optim.warmup_epochs = 0  # epochs of linear warm-up; 0 disables
    config.optim.by_epoch = True  # the cosine changes every epoch; False: every step
    config.optim.gradient_accumulation_steps = 1  # parts of a batch; more lowers memory use

    config.profile, config.debug_nans = ours.profile, ours.debug_nans
    config.deterministic = ours.deterministic
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
