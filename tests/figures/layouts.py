"""Writes layouts.npz: state dicts of other projects and their features, for tests/test_layouts.py.

    python tests/figures/layouts.py    # PyTorch 2.13.0, CPU, float32

Each network is a narrow ResNet with random weights under the names that the project's files have.
The names are facts about the files; the modules here are written for this script. A slash stands
between the keys of nested mappings, and the names of modules contain dots.
"""

import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WIDTH, STAGES = 2, 2


class Block(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int, bottleneck: bool, shortcut: str):
        super().__init__()
        convs = [(3, channels, stride), (3, channels, 1)]
        if bottleneck:
            convs = [(1, channels, 1), (3, channels, stride), (1, 4 * channels, 1)]
        self.depth, outputs, c = len(convs), convs[-1][1], inputs
        for i, (size, width, s) in enumerate(convs, 1):
            conv = nn.Conv2d(c, width, size, s, padding=size // 2, bias=False)
            self.add_module(f'conv{i}', conv)
            self.add_module(f'bn{i}', nn.BatchNorm2d(width))
            c = width
        self.shortcut = shortcut
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.add_module(shortcut + '_', nn.Sequential(project, nn.BatchNorm2d(outputs)))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f'bn{i}')(self.get_submodule(f'conv{i}')(y))
            y = F.relu(y) if i < self.depth else y
        project = getattr(self, self.shortcut + '_', nn.Identity())
        return F.relu(project(x) + y)


def resnet(*, bottleneck=False, size=7, padding=None, shortcut='downsample') -> nn.Sequential:
    """The children of a ResNet by torchvision's names."""
    padding = size // 2 if padding is None else padding
    net = nn.Sequential()
    net.add_module('conv1', nn.Conv2d(3, WIDTH, size, 2 if size == 7 else 1, padding, bias=False))
    net.add_module('bn1', nn.BatchNorm2d(WIDTH))
    net.add_module('relu', nn.ReLU())
    if size == 7:
        net.add_module('maxpool', nn.MaxPool2d(3, 2, 1))
    c = WIDTH
    for i in range(STAGES):
        width = WIDTH * 2**i
        block = Block(c, width, 2 if i else 1, bottleneck, shortcut)
        c = width * 4 if bottleneck else width
        net.add_module(f'layer{i + 1}', nn.Sequential(block))
    net.add_module('avgpool', nn.AdaptiveAvgPool2d(1))
    net.add_module('flatten', nn.Flatten())
    return randomize(net)


def numbered(net: nn.Sequential) -> nn.Sequential:
    """The same network as an nn.Sequential of the children, whose names are numbers."""
    return nn.Sequential(*net.children())


def randomize(net: nn.Module) -> nn.Module:
    """Weights and statistics that training could have left, exact in float16."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features) / 8)
            module.running_var.copy_(1 + torch.randn(module.num_features).abs() / 8)
            module.weight.data.copy_(1 + torch.randn(module.num_features) / 8)
            module.bias.data.copy_(0.5 + torch.randn(module.num_features) / 8)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    return net.eval()


def head(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, 2) for name in names}


def under(prefix: str, net: nn.Module) -> dict[str, torch.Tensor]:
    state = {name.replace('_.', '.'): x for name, x in net.state_dict().items()}
    return {f'{prefix}{name}': x for name, x in state.items()}


def layouts() -> dict[str, tuple[nn.Module, dict[str, torch.Tensor]]]:
    """Layout -> the network that the project evaluates, and the file."""
    net = resnet
    made = {}

    def add(name, chosen, *states):
        made[name] = chosen, {key: x for state in states for key, x in state.items()}

    q, other = net(), net()
    add('torchvision', q, under('', q), head('fc.weight', 'fc.bias'))
    q = net(bottleneck=True)
    add('timm with EMA', q, under('state_dict/', net(bottleneck=True)), under('state_dict_ema/', q))
    q = net(bottleneck=True)
    heads = head(
        'state_dict/module.projection_head.0.weight', 'state_dict/module.prototypes.weight'
    )
    add('SwAV', q, under('state_dict/module.', q), heads)
    q = net()
    heads = head(
        'state_dict/module.encoder_q.fc.0.weight',
        'state_dict/module.encoder_k.fc.0.weight',
        'state_dict/module.queue',
        'state_dict/module.queue_ptr',
    )
    add(
        'MoCo v1 and v2',
        q,
        under('state_dict/module.encoder_k.', other),
        under('state_dict/module.encoder_q.', q),
        heads,
    )
    q = net()
    heads = head(
        'state_dict/module.base_encoder.fc.0.weight', 'state_dict/module.predictor.0.weight'
    )
    add(
        'MoCo v3',
        q,
        under('state_dict/module.base_encoder.', q),
        under('state_dict/module.momentum_encoder.', net()),
        heads,
    )
    q = net()
    add(
        'BYOL, byol-pytorch',
        q,
        under('net.', q),
        under('online_encoder.net.', q),
        under('target_encoder.net.', net()),
        head('online_encoder.projector.0.weight', 'online_predictor.0.weight'),
    )
    q = net()
    add(
        'BYOL, PyTorch-BYOL',
        q,
        under('online_network_state_dict/encoder.', numbered(q)),
        under('target_network_state_dict/encoder.', numbered(net())),
        head('online_network_state_dict/projetion.net.0.weight'),
        {'optimizer_state_dict/state/0/momentum_buffer': torch.ones(2)},
    )
    q = net()
    add(
        'SimCLR, backbone',
        q,
        under('state_dict/backbone.', q),
        head('state_dict/backbone.fc.0.weight', 'state_dict/backbone.fc.2.weight'),
    )
    q = net()
    add('SimCLR, encoder', q, under('encoder.', q), head('projector.0.weight'))
    q = net(size=3)
    add('SimCLR, f and g', q, under('f.', numbered(q)), head('g.0.weight'))
    q = net(size=3, shortcut='shortcut')
    add('SupContrast', q, under('model/encoder.module.', q), head('model/head.0.weight'))
    q = net()
    add(
        'lightly',
        q,
        under('state_dict/backbone_momentum.', numbered(net())),
        under('state_dict/backbone.', numbered(q)),
        head('state_dict/projection_head.layers.0.weight', 'state_dict/criterion.memory_bank.bank'),
    )
    q = net(size=3)
    # lightly's own ResNets apply ReLU in forward and have no max-pool.
    plain = nn.Sequential(*[m for m in q.children() if not isinstance(m, nn.ReLU)])
    add('lightly, its own ResNet', q, under('state_dict/model.backbone.', plain))
    q = net()
    add(
        'lightly, DINO',
        q,
        under('state_dict/backbone.', q),
        under('state_dict/student_backbone.', net()),
        head('state_dict/projection_head.layers.0.weight'),
    )
    q = net()
    add(
        'solo-learn',
        q,
        under('state_dict/backbone.', q),
        under('state_dict/momentum_backbone.', net()),
        head('state_dict/classifier.weight', 'state_dict/projector.0.weight'),
    )
    q = net(size=3, padding=2)
    add(
        'solo-learn, CIFAR',
        q,
        under('state_dict/backbone.', q),
        head('state_dict/classifier.weight', 'state_dict/projector.0.weight'),
    )
    q = net(bottleneck=True)
    add(
        'mmselfsup',
        q,
        under('state_dict/backbone.', q),
        under('state_dict/target_net.module.0.', net(bottleneck=True)),
        head('state_dict/neck.fc0.weight', 'state_dict/target_net.module.1.fc0.weight'),
    )
    q = net()
    add(
        'mmselfsup, MoCo',
        q,
        under('state_dict/encoder_q.0.', q),
        under('state_dict/backbone.', q),
        under('state_dict/encoder_k.0.', net()),
        head('state_dict/encoder_q.1.mlp.0.weight', 'state_dict/neck.mlp.0.weight'),
    )
    q = net()
    add(
        'mmpretrain',
        q,
        under('ema_state_dict/backbone.', net()),
        under('state_dict/backbone.', q),
        head('state_dict/head.fc.weight'),
    )
    q = net(bottleneck=True)
    model = 'classy_state_dict/base_model/model/'
    add(
        'VISSL',
        q,
        under(f'{model}trunk/_feature_blocks.', q),
        under('classy_state_dict/loss/moco_encoder.trunk._feature_blocks.', net(bottleneck=True)),
        head(f'{model}heads/0.clf.0.weight'),
        {'classy_state_dict/optimizer/optim/0/momentum_buffer': torch.ones(2)},
    )
    q = net(bottleneck=True)
    add(
        'DINO',
        q,
        under('student/module.backbone.', net(bottleneck=True)),
        under('teacher/module.backbone.', q),
        head('student/module.head.mlp.0.weight', 'teacher/module.head.mlp.0.weight'),
        {'dino_loss/center': torch.ones(1, 2)},
    )
    q = net()
    add(
        'Barlow Twins',
        q,
        under('model/module.backbone.', q),
        head('model/module.projector.0.weight', 'model/module.bn.running_mean'),
    )
    q = net()
    add(
        'Lightning with EMA',
        q,
        under('state_dict/model._orig_mod.', net()),
        under('state_dict/ema.module.', q),
    )
    return made


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16).half().float()
    figures = {'images': images.permute(0, 2, 3, 1).numpy().astype(np.float16)}
    for name, (net, state) in layouts().items():
        with torch.inference_mode():
            figures[f'{name}/features'] = net(images).numpy()
        shapes = {key: list(x.shape) for key, x in state.items() if x.is_floating_point()}
        figures[f'{name}/shapes'] = np.array(json.dumps(shapes))
        values = [state[key].detach().flatten().numpy().astype(np.float16) for key in shapes]
        figures[f'{name}/values'] = np.concatenate(values)
    np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), **figures)


if __name__ == '__main__':
    with torch.no_grad():
        main()
