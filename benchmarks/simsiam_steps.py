"""Steps that step_vs_pytorch.py compares: this package's and PyTorch's, with the same network."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

STAGES = {'resnet50': (3, 4, 6, 3), 'resnet18': (2, 2, 2, 2), 'tiny': (1, 1, 1, 1)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A step to compare; `apart` measures the two implementations one after the other."""

    network: str
    size: int
    batch: int
    dim: int = 2048
    apart: bool = False

    @property
    def name(self) -> str:
        return f'{self.network}-{self.batch}'


SETTINGS = [
    Setting('resnet50', 224, 256),
    Setting('resnet50', 224, 512, apart=True),
    Setting('resnet18', 32, 512),
    Setting('resnet50', 224, 64),
]
SMOKE = [Setting('tiny', 16, 4, 64), Setting('tiny', 16, 8, 64, apart=True)]

# This package's step with another flag of XLA.
FLAGS = {
    'convolution-commands': '--xla_gpu_enable_command_buffer=+convolution',
    'no-commands': '--xla_gpu_enable_command_buffer=',
    'fusion-autotuner': '--xla_gpu_experimental_enable_fusion_autotuner=true',
    'exhaustive-tiling': '--xla_gpu_exhaustive_tiling_search=true',
    'no-triton-products': '--xla_gpu_enable_triton_gemm=false',
    'cudnn-products': '--xla_gpu_cudnn_gemm_fusion_level=2',
    'no-autotuning': '--xla_gpu_autotune_level=0',
}
# torch.compile with another mode.
MODES = {f'compile-{mode}': mode for mode in ('default', 'reduce-overhead', 'max-autotune')}

# (run(steps) -> seconds until N steps are done, number of parameters, bytes of memory in use).
Built = tuple[Callable[[int], float], int, Callable[[], int | None]]


def build_ours(setting: Setting, kernels: str, *, merge_views: bool = False) -> Built:
    import jax

    from simsiam_jax.methods import simsiam
    from simsiam_jax.models import resnet
    from simsiam_jax.training import mesh as mesh_lib
    from simsiam_jax.training import optim, step

    mesh_lib.use_compilation_cache()
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    backbone = resnet.make(
        'resnet50' if setting.network == 'resnet50' else 'resnet18',
        stages=STAGES[setting.network],
        stem='imagenet' if setting.size > 64 else 'cifar',
        dtype='bfloat16',
        axis_name=mesh_lib.DATA,
        kernels=kernels,
    )
    method = simsiam.make(backbone, dim=setting.dim, predictor_hidden_dim=setting.dim // 4)
    tx, _ = optim.make(batch_size=setting.batch, epochs=100, steps_per_epoch=1000)
    shape = (setting.size, setting.size, 3)
    state = mesh_lib.replicate(step.init_state(method, tx, 0, shape), mesh)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    rng = np.random.default_rng(0)
    views = [rng.standard_normal((setting.batch, *shape), np.float32) for _ in range(2)]
    batch = mesh_lib.shard(views, mesh)
    train_step = step.make_train_step(method, tx, mesh, merge_views=merge_views)

    def run(steps: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = train_step(state, batch)
        if not np.isfinite(float(metrics['loss'])):
            raise FloatingPointError('the loss is not finite')
        return time.perf_counter() - begin

    def memory() -> int | None:
        stats = jax.devices()[0].memory_stats()
        return stats and stats.get('peak_bytes_in_use')

    return run, parameters, memory


def build_torch(setting: Setting, mode: str | None) -> Built:
    import torch
    import torchvision
    from torch import nn

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cudnn.benchmark = True

    def layer(inputs: int, outputs: int, *after: nn.Module) -> list[nn.Module]:
        return [nn.Linear(inputs, outputs, bias=not after), *after]

    class SimSiam(nn.Module):
        """Section 3: a three-layer projector with BN, a bottleneck predictor."""

        def __init__(self) -> None:
            super().__init__()
            blocks = torchvision.models.resnet
            self.encoder = blocks.ResNet(
                blocks.Bottleneck if setting.network == 'resnet50' else blocks.BasicBlock,
                list(STAGES[setting.network]),
                zero_init_residual=True,
            )
            if setting.size <= 64:
                self.encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
                self.encoder.maxpool = nn.Identity()
            features, dim = self.encoder.fc.in_features, setting.dim
            self.encoder.fc = nn.Sequential(
                *layer(features, dim, nn.BatchNorm1d(dim), nn.ReLU(inplace=True)),
                *layer(dim, dim, nn.BatchNorm1d(dim), nn.ReLU(inplace=True)),
                *layer(dim, dim, nn.BatchNorm1d(dim, affine=False)),
            )
            self.predictor = nn.Sequential(
                *layer(dim, dim // 4, nn.BatchNorm1d(dim // 4), nn.ReLU(inplace=True)),
                *layer(dim // 4, dim),
            )

        def forward(self, x1: Any, x2: Any) -> Any:
            z1, z2 = self.encoder(x1), self.encoder(x2)
            p1, p2 = self.predictor(z1), self.predictor(z2)
            cosine = nn.functional.cosine_similarity
            return -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) / 2

    model = SimSiam().to(device, memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    shape = (setting.batch, 3, setting.size, setting.size)
    views = [
        torch.randn(shape, device=device).to(memory_format=torch.channels_last) for _ in range(2)
    ]
    forward = torch.compile(model, mode=mode) if mode else model

    def run(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = forward(*views)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if not np.isfinite(loss.item()):
            raise FloatingPointError('the loss is not finite')
        return time.perf_counter() - begin

    def memory() -> int | None:
        return torch.cuda.max_memory_allocated() if device == 'cuda' else None

    return run, parameters, memory


BUILD: dict[str, Callable[[Setting], Built]] = {
    **{name: functools.partial(build_ours, kernels='auto') for name in ('ours', *FLAGS)},
    'plain': functools.partial(build_ours, kernels='plain'),
    'merged': functools.partial(build_ours, kernels='auto', merge_views=True),
    'eager': functools.partial(build_torch, mode=None),
    **{name: functools.partial(build_torch, mode=mode) for name, mode in MODES.items()},
}
