"""Loads the trained backbone of a checkpoint or a weight file."""

import dataclasses
import os
from typing import Any

import jax

from simsiam_jax.checkpoints import checkpoint_reader, weights
from simsiam_jax.models import backbones


@dataclasses.dataclass(frozen=True)
class LoadedEncoder:
    """A backbone, its weights, and the configuration that it was trained with.

    Attributes:
      module: Backbone.
      variables: {'params', 'batch_stats'}, float32.
      config: Configuration of the run that trained it; `augment` and `data` describe its input
        images. The configuration of a file is that of weights.file_config.
      origin: Path that it is from, for messages.
      assumed: See weights.Weights.
    """

    module: backbones.AnyBackbone
    variables: dict[str, Any]
    config: dict[str, Any]
    origin: str = 'the encoder'
    assumed: str = ''


def load_encoder(
    path: str | os.PathLike[str], step: int | None = None, *, backbone: Any = None
) -> tuple[backbones.AnyBackbone, dict[str, Any]]:
    """Loads the trained backbone of a run or a file onto the first local device.

    ::

        module, variables = load_encoder('runs/quickstart')
        features = module.apply(variables, images)  # [B, D] of normalized images [B, H, W, C]

    Args:
      path: Workdir of a run, or a file with a ResNet: .pth, .pth.tar, .pt, .ckpt, .torch, .bin
        (these need torch), .safetensors or .msgpack. FILE#PREFIX selects one of several networks.
      step: Step of the checkpoint; None loads the latest.
      backbone: Network that was given to pretrain() as an object; None for all others.

    Returns:
      The module, and its {'params', 'batch_stats'} in float32.

    Raises:
      UserError: There is no such checkpoint, or the file is damaged or has a different network.
    """
    encoder = open_encoder(path, step, backbone=backbone)
    return encoder.module, encoder.variables


def open_encoder(
    path: str | os.PathLike[str], step: int | None = None, *, backbone: Any = None
) -> LoadedEncoder:
    """Loads the backbone as load_encoder() does, with its configuration.

    Args:
      path: Workdir of a run, or a weight file.
      step: Step of the checkpoint; None loads the latest.
      backbone: Network that was given to pretrain() as an object; None for all others.

    Raises:
      UserError: There is no such checkpoint, or the file is damaged or has a different network.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if weights.is_file(path):
        loaded = weights.from_file(path)
        weights.warn_of_assumed(loaded)
        variables = jax.device_put(weights.part(loaded, 'backbone'), device)
        module = backbones.from_config(loaded.config)
        return LoadedEncoder(module, variables, loaded.config, loaded.origin, loaded.assumed)
    item = checkpoint_reader.load(path, 'encoder', step=step)
    # Checkpoints leave out empty collections.
    variables = jax.device_put({'batch_stats': {}} | item.tree, device)
    with backbones.provide(backbone):
        module = backbones.from_config(item.run.config)
    return LoadedEncoder(module, variables, item.run.config, os.fspath(path))
