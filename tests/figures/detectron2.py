"""Writes detectron2.json: names and shapes that Detectron2's R50-C4 and R50-FPN give to a ResNet.

    python tests/figures/detectron2.py

From the modules of Detectron2's ResNet (modeling/backbone/resnet.py): BasicStem has conv1;
BottleneckBlock has conv1, conv2, conv3, and shortcut where the channels change; each is a Conv2d
without bias whose norm is a module of its own, FrozenBatchNorm2d by default. C4 keeps res5 in its
ROI heads (modeling/roi_heads), FPN keeps the whole ResNet as bottom_up.
"""

import json
import pathlib

BLOCKS = {'res2': 3, 'res3': 4, 'res4': 6, 'res5': 3}
NORM = ('weight', 'bias', 'running_mean', 'running_var')


def conv(name: str, channels_in: int, channels_out: int, size: int) -> dict[str, list[int]]:
    shapes = {f'{name}.weight': [channels_out, channels_in, size, size]}
    return shapes | {f'{name}.norm.{leaf}': [channels_out] for leaf in NORM}


def stage(name: str, channels_in: int, width: int) -> dict[str, list[int]]:
    shapes = {}
    for i in range(BLOCKS[name]):
        if i == 0:
            shapes |= conv(f'{name}.0.shortcut', channels_in, 4 * width, 1)
        shapes |= conv(f'{name}.{i}.conv1', channels_in, width, 1)
        shapes |= conv(f'{name}.{i}.conv2', width, width, 3)
        shapes |= conv(f'{name}.{i}.conv3', width, 4 * width, 1)
        channels_in = 4 * width
    return shapes


def main() -> None:
    parts = {'stem': conv('stem.conv1', 3, 64, 7), 'res2': stage('res2', 64, 64)}
    for i, name in enumerate(('res3', 'res4', 'res5')):
        parts[name] = stage(name, 256 * 2**i, 128 * 2**i)
    prefixes = {
        'R50-C4': dict.fromkeys(parts, 'backbone') | {'res5': 'roi_heads'},
        'R50-FPN': dict.fromkeys(parts, 'backbone.bottom_up'),
    }
    models = {
        model: {
            f'{prefix[part]}.{name}': shape
            for part, shapes in parts.items()
            for name, shape in shapes.items()
        }
        for model, prefix in prefixes.items()
    }
    # A line for each name.
    text = ',\n'.join(
        f'"{model}": {{\n' + ',\n'.join(f'{json.dumps(n)}: {s}' for n, s in shapes.items()) + '\n}'
        for model, shapes in models.items()
    )
    pathlib.Path(__file__).with_suffix('.json').write_text(f'{{\n{text}\n}}\n')


if __name__ == '__main__':
    main()
