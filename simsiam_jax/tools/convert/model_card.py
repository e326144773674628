"""The model card of an encoder: README.md of a folder for the Hugging Face Hub."""

import json
from typing import Any

from simsiam_jax._version import __version__
from simsiam_jax.checkpoints import weight_files
from simsiam_jax.checkpoints.weights import Weights
from simsiam_jax.runtime import storage

# Sections of the configuration to publish: not the paths of images and runs.
_SECTIONS = ('batch_size', 'epochs', 'seed', 'model', 'method', 'augment', 'optim')

_CARD = """---
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- simsiam
- self-supervised-learning
---
# {name}, pre-trained by {method}

An encoder without classifier, pre-trained without labels by simsiam_jax
{version}. It returns {width} features of an image.

## Use

    import simsiam_jax

    encoder = simsiam_jax.Encoder.load('FOLDER')
    features = encoder(images)  # uint8 images of any size -> [N, {width}] float32
{timm}
## Images

{images}

## Measured

{figures}

## Configuration

```json
{config}
```
"""

_TIMM = """
or, in PyTorch:

    model = timm.create_model('local-dir:FOLDER', pretrained=True)
"""


def text(weights: Weights, width: int, *, in_timm: bool) -> str:
    """Returns the model card.

    Args:
      weights: Weights of the encoder.
      width: Number of features.
      in_timm: Whether timm has the network.

    Raises:
      UserError: The measured figures of the run cannot be read.
    """
    config = weights.config
    images = weight_files.describe_images(config) | {'channels': config['data']['channels']}
    return _CARD.format(
        library='timm' if in_timm else 'simsiam_jax',
        name=config['model']['name'],
        method=config['method']['name'],
        version=__version__,
        width=width,
        timm=_TIMM if in_timm else '',
        images=_table(images),
        figures=_figures(weights.origin),
        config=json.dumps({key: config[key] for key in _SECTIONS if key in config}, indent=2),
    )


def _table(values: dict[str, Any]) -> str:
    rows = [f'| {key} | {value} |' for key, value in values.items()]
    return '\n'.join(['| | |', '|---|---|', *rows])


def _figures(origin: str) -> str:
    """Returns the accuracies in the verdict.json of the run that the weights are from."""
    file = storage.folder(origin) / 'verdict.json'
    with storage.reading(file):
        if not file.exists():
            return 'Nothing was measured.'
        verdict = json.loads(file.read_text())
    if 'accuracy' not in verdict:
        return str(verdict['sentence'])
    top1 = {name: f'{value["top1"]:.4f}' for name, value in verdict['accuracy'].items()}
    head = f'{verdict["title"]} top-1 of {verdict["images"]:,} test images:'
    return f'{head}\n\n{_table(top1)}\n\n{verdict["sentence"]}'
