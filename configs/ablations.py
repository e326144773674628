"""Every ablation of the paper, one row each; the ImageNet baseline has 68.1% (paper).

    python -m simsiam_jax.main --config=configs/ablations.py:no_stop_gradient --workdir=DIR
    python -m simsiam_jax.main --config=configs/ablations.py:alternate_10,digits --workdir=DIR

ROWS lists their names, with the paper's table and result (ImageNet, 100 epochs, linear top-1).
`ROW,digits` and `ROW,cifar10` apply the same change to small data, and `ROW,cifar10_small` to the
part of CIFAR-10 and the small network that a CPU trains in minutes. Widths shrink by the ratio of
the bases (128 on digits instead of 2048), and batch sizes by a share of ImageNet's. More words go
to the configuration of the data: `ROW,cifar10,npz:FILE` reads CIFAR-10 from a file.

    python -m simsiam_jax.tools.ledger --config=configs/ablations.py --data=digits --workdir=DIR

runs all rows in turn and writes the table; `--rows=core` runs only those of CORE, the paper's
collapses and their baseline.
"""

import dataclasses
import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

from simsiam_jax import errors


@dataclasses.dataclass(frozen=True)
class Row:
    """An ablation.

    Attributes:
      where: Table or section of the paper.
      paper: Result of the paper, linear top-1 in % on ImageNet.
      change: Keys that differ from the baseline, with their values.
      method: Method of the baseline.
      dim: Width of z where the baseline has 2048; the predictor's hidden layer is a quarter.
      batch: Batch size where the baseline has 512; warm-up as in the paper.
    """

    where: str
    paper: str
    change: dict[str, Any] = dataclasses.field(default_factory=dict)
    method: str = 'simsiam'
    dim: int = 2048
    batch: int = 512


_HEADS = ('projector_hidden_bn', 'projector_output_bn', 'predictor_hidden_bn')

ROWS: dict[str, Row] = {
    'baseline': Row('Fig. 2, Tables 1-4', '68.1'),
    'no_stop_gradient': Row('Fig. 2', '0.1', {'method.stop_gradient': False}),
    'predictor_none': Row('Table 1', '0.1', {'method.predictor': False}),
    'predictor_fixed': Row('Table 1', '1.5', {'optim.predictor_schedule': 'fixed'}),
    'predictor_decayed': Row('Table 1', '67.7', {'optim.predictor_schedule': 'decayed'}),
    'batch_64': Row('Table 2', '66.1', batch=64),
    'batch_128': Row('Table 2', '67.3', batch=128),
    'batch_256': Row('Table 2', '68.1', batch=256),
    'batch_512': Row('Table 2', '68.1'),
    'batch_1024': Row('Table 2', '68.0', batch=1024),
    'batch_2048': Row('Table 2', '67.9', batch=2048),
    'batch_4096': Row('Table 2', '64.0', batch=4096),
    'bn_none': Row(
        'Table 3',
        '34.6',
        {f'method.{key}': False for key in _HEADS} | {'optim.warmup_epochs': 10},
    ),
    'bn_hidden': Row('Table 3', '67.4', {'method.projector_output_bn': False}),
    'bn_default': Row('Table 3', '68.1'),
    'bn_all': Row('Table 3', 'unstable', {'method.predictor_output_bn': True}),
    'cross_entropy': Row('Sec. 4.5', '63.2', {'method.similarity': 'cross_entropy'}),
    'asymmetric': Row('Sec. 4.6', '64.8', {'method.pairs': 'asymmetric'}),
    'two_asymmetric': Row(
        'Sec. 4.6', '67.3', {'method.pairs': 'two_asymmetric', 'local_crops.number': 2}
    ),
    'width_256': Row('App. B', '65.3', dim=256),
    'width_512': Row('App. B', '67.2', dim=512),
    'width_1024': Row('App. B', '67.5', dim=1024),
    'width_2048': Row('App. B', '68.1'),
    'alternate_10': Row('Sec. 5.2', '68.7', {'alternate.steps': 10}),
    'alternate_100': Row('Sec. 5.2', '68.9', {'alternate.steps': 100}),
    'alternate_epoch': Row('Sec. 5.2', '67.0', {'alternate.steps': 0}),
    'moving_average': Row('Sec. 5.2', '55.0', method='moving_average'),
    'no_moving_average': Row(
        'Sec. 5.2', 'collapse', {'method.average': 0.0}, method='moving_average'
    ),
    'moco_v2': Row('Table 4', '67.4', method='moco_v2'),
    'byol': Row('Table 4', '66.5', method='byol'),
    'simclr': Row('Sec. 6.2', '66.5', method='simclr'),
    'simclr_predictor': Row('Sec. 6.2', '66.4', {'method.predictor': True}, method='simclr'),
    'simclr_predictor_stop_gradient': Row(
        'Sec. 6.2',
        '66.0',
        {'method.predictor': True, 'method.stop_gradient': True},
        method='simclr',
    ),
    'swav': Row('Sec. 6.2', '66.5', method='swav'),
    'swav_predictor': Row('Sec. 6.2', '65.2', {'method.predictor': True}, method='swav'),
    'swav_no_stop_gradient': Row('Sec. 6.2', 'NaN', {'method.stop_gradient': False}, method='swav'),
}

CORE = (
    'baseline',
    'no_stop_gradient',
    'predictor_none',
    'predictor_fixed',
    'bn_none',
    'bn_hidden',
    'asymmetric',
)

# Data -> base configuration with its word, number of images, and the factors on ImageNet's widths
# and batches.
BASES = {
    'imagenet': ('imagenet.py', '', 1281167, 1.0, 1.0),
    'cifar10': ('cifar10.py', '', 50000, 1.0, 1.0),
    'cifar10_small': ('cifar10.py', 'small', 5000, 1 / 16, 1 / 4),
    'digits': ('quickstart.py', '', 1437, 1 / 16, 1 / 4),
}


def get_config(variant: str = 'baseline') -> ConfigDict:
    name, _, rest = variant.partition(',')
    data, _, words = rest.partition(',')
    errors.check_choice('the row of configs/ablations.py', name, ROWS)
    errors.check_choice('the data of configs/ablations.py', data or 'imagenet', BASES)
    row, (file, word, images, width, share) = ROWS[name], BASES[data or 'imagenet']
    base = runpy.run_path(str(pathlib.Path(__file__).parent / file))
    averaged = row.method == 'moving_average'
    method = 'simsiam' if averaged else row.method
    config = base['get_config'](','.join(filter(None, (method, word, words))))
    if row.batch != 512:
        config.batch_size = round(row.batch * share)
        if row.batch >= 1024:
            config.optim.warmup_epochs = 10
    if averaged:
        config.optim.predictor_schedule = 'decayed'
        config.method = ConfigDict(
            {
                'name': 'moving_average',
                'images': images,
                'average': 0.8,
                'dim': config.method.dim,
                'projector_layers': config.method.projector_layers,
            }
        )
    elif row.method == 'simsiam' and row.dim != 2048:
        config.method.dim = round(row.dim * width)
        config.method.predictor_hidden_dim = config.method.dim // 4
    config.local_crops.size = config.augment.size
    config.local_crops.crop_scale = config.augment.crop_scale
    config.update_from_flattened_dict(row.change)
    return config
