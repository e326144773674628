"""The trained backbone of a checkpoint or a file, for everything that comes after pre-training."""

import dataclasses
import pathlib
from typing import Any

import jax

from simsiam_jax.checkpoints import checkpoint_reader, weights
from simsiam_jax.models import resnet


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A backbone, its weights, and what it was trained with.

    Attributes:
      variables: {'params', 'batch_stats'}, float32.
      config: of the run that made it; augment and data say what images it takes. See
        weights.file_config for files.
    """

    module: resnet.ResNet
    variables: dict[str, Any]
    config: dict[str, Any]


def load_encoder(
    path: str | pathlib.Path, step: int | None = None
) -> tuple[resnet.ResNet, dict[str, Any]]:
    """The trained backbone of a run or a file, on whatever device there is.

        module, variables = load_encoder('runs/quickstart')
        features = module.apply(variables, images)  # [B, D] of normalized images [B, H, W, C]

    Args:
      path: the workdir of a run, or a file: .pth, .pth.tar, .pt (these need torch), .safetensors,
        .msgpack, of a ResNet as torchvision, timm, SimSiam's or MoCo's official code have it.
      step: of the checkpoint; None: the latest.

    Returns:
      The module, and its {'params', 'batch_stats'} as float32.

    Raises:
      UserError: there is no such checkpoint, or the file is damaged or of another network.
    """
    encoder = open_encoder(path, step)
    return encoder.module, encoder.variables


def open_encoder(path: str | pathlib.Path, step: int | None = None) -> Encoder:
    """As load_encoder, with the configuration."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if weights.is_file(path):
        found = weights.from_file(path)
        variables = jax.device_put(weights.part(found, 'backbone'), device)
        return Encoder(resnet.make(**found.config['model']), variables, found.config)
    item = checkpoint_reader.load(path, 'encoder', step=step)
    variables = jax.device_put(item.tree, device)
    return Encoder(resnet.make(**item.run.config['model']), variables, item.run.config)
