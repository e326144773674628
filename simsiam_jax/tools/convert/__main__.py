"""Weights from one format to another, compared before they are written.

python -m simsiam_jax.tools.convert --source=SOURCE --target=TARGET --format=FORMAT

SOURCE is the workdir of a run or a file: .pth, .pth.tar, .safetensors of a ResNet as torchvision,
timm, SimSiam's or MoCo's official code save it, or a .msgpack of FORMAT flax. FORMAT:

  torchvision  state dict of torchvision.models.resnetNN, all but fc: .pth or .safetensors
  timm         a folder that timm.create_model('local-dir:TARGET') loads
  detectron2   .pkl for the ResNets of Detectron2
  simsiam      .pth.tar as SimSiam's official code saves it: backbone, projector, predictor
  state_dict   as torchvision, of any stem, width and number of channels
  flax         the backbone as .msgpack, or for other names as a folder of Orbax
  workdir      a workdir that pre-training starts from

Where torch is installed the networks of both sides run on the same random images before
anything is written; outputs that differ by more than LIMIT of their scale end the conversion.
"""

import sys

from absl import flags, logging

from simsiam_jax import command_line, errors
from simsiam_jax.tools.convert import conversion


def run(_: command_line.Arguments) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.ERROR)
    try:
        print(conversion.convert(given.source, given.target, given.format, given.step))
    except errors.UserError as error:
        sys.exit(f'error: {error}')


def main() -> None:
    flags.DEFINE_string('source', None, 'Workdir of a run, or file of weights.')
    flags.DEFINE_string('target', None, 'File or folder to write.')
    flags.DEFINE_string('format', None, 'Format of the target.')
    flags.DEFINE_integer('step', None, 'Step of the checkpoint; default: the latest.')
    command_line.start(run, 'source', 'target', 'format')


if __name__ == '__main__':
    main()
