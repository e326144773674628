"""The trained backbone of a checkpoint, for everything that comes after pre-training."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from simsiam_jax import errors
from simsiam_jax.models import resnet
from simsiam_jax.training.checkpoint import FOLDER


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A backbone, its weights, and what it was trained with.

    Attributes:
      variables: {'params', 'batch_stats'}, float32.
      config: of the run that made it; augment and data say what images it takes.
    """

    module: resnet.ResNet
    variables: dict[str, Any]
    config: dict[str, Any]


def load_encoder(
    workdir: str | pathlib.Path, step: int | None = None
) -> tuple[resnet.ResNet, dict[str, Any]]:
    """The trained backbone of a run, on whatever device there is.

        module, variables = load_encoder('runs/quickstart')
        features = module.apply(variables, images)  # [B, D] of normalised images [B, H, W, C]

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the latest.

    Returns:
      The module, and its {'params', 'batch_stats'} as float32.

    Raises:
      UserError: there is no such checkpoint.
    """
    encoder = open_encoder(workdir, step)
    return encoder.module, encoder.variables


def open_encoder(workdir: str | pathlib.Path, step: int | None = None) -> Encoder:
    """As load_encoder, with the configuration."""
    folder = epath.Path(workdir).absolute() / FOLDER
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        found = f'steps {", ".join(map(str, sorted(steps)))}' if steps else 'none'
        wanted = 'a checkpoint' if step is None else f'step {step}'
        raise errors.UserError(
            f'{wanted} was expected in {folder}, there is: {found}; give the workdir of a '
            'pre-training run'
        )
    item = folder / str(max(steps) if step is None else step)
    config = json.loads((item / 'meta' / 'metadata').read_text())['config']
    backbone = resnet.make(**config['model'])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        resnet.abstract_variables(backbone, config['data']['channels']),
    )
    variables = ocp.StandardCheckpointer().restore(item / 'encoder', abstract)
    return Encoder(backbone, variables, config)
