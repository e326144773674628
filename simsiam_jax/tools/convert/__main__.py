"""Converts weights from one format to another, and compares them before writing.

::

    python -m simsiam_jax.tools.convert --source=SOURCE --target=TARGET --format=FORMAT

SOURCE is the workdir of a run or a file. The file is a .msgpack of FORMAT flax, or a .pth,
.pth.tar, .pt, .ckpt, .torch, .bin or .safetensors with a ResNet, or a ViT or ConvNeXt under timm's
names, under any prefix. These projects store several networks; the one that they evaluate is
loaded::

    torchvision, timm, SwAV         plain names; state_dict_ema if timm stored it
    SimSiam                         encoder, with projector and predictor
    MoCo v1 and v2, MoCo v3         encoder_q, base_encoder
    BYOL                            online_encoder, online_network_state_dict
    SimCLR, SupContrast             backbone, encoder or f
    Barlow Twins                    backbone
    DINO                            teacher
    lightly                         backbone.0 to backbone.7, or backbone
    solo-learn                      backbone
    mmselfsup, mmpretrain           backbone
    VISSL                           base_model.model.trunk._feature_blocks
    Lightning                       state_dict, model or ema

FILE#PREFIX selects another network, such as moco.pth.tar#encoder_k. Other heads and networks are
left out and listed. FORMAT is one of::

    torchvision  state dict of torchvision.models.resnetNN without fc: .pth or .safetensors
    timm         a folder that timm.create_model('local-dir:TARGET') loads
    detectron2   .pkl for the ResNets of Detectron2
    simsiam      .pth.tar of SimSiam's official code: backbone, projector, predictor
    state_dict   like torchvision, for any stem, width and number of channels; ViTs and ConvNeXts
                 have timm's names
    huggingface  a folder with a model card, for the Hugging Face Hub; timm and load_encoder open it
    flax         the backbone as .msgpack, or with another ending as an Orbax folder
    jax_export   a program that needs only JAX (jax.export.deserialize(bytes).call) on CPU, GPU and
                 TPU: uint8 images [batch, size, size, channels] -> features
    workdir      a workdir that pre-training starts from

The size, resize, mean and std of the images go along: into .safetensors and timm's config.json, and
for other formats into TARGET.json beside the file.

If torch is installed, both networks run on the same random images before anything is written. The
conversion stops if their outputs differ by more than 1e-4 of their scale.
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
    command_line.define_path('source', None, 'Workdir of a run, or file of weights.')
    command_line.define_path('target', None, 'File or folder to write.')
    flags.DEFINE_string('format', None, 'Format of the target.')
    flags.DEFINE_integer('step', None, 'Step of the checkpoint; default the latest.')
    command_line.start(run, 'source', 'target', 'format')


if __name__ == '__main__':
    main()
