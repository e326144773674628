"""Tests of the Python interface, used as in a notebook or in a user's own program."""

import ast
import dataclasses
import inspect
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from commands import Commands, environment
from configurations import TRAIN_ONLY
from PIL import Image

import simsiam_jax
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.data import geometry, python_sources, sources

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = sources.open_source('digits')
IMAGES, LABELS = DIGITS.images[:400], DIGITS.labels[:400]
SHORT: dict[str, Any] = {
    'config': 'quickstart:3ep',
    'model.width_multiplier': 0.125,
    'batch_size': 64,
} | TRAIN_ONLY

pytestmark = pytest.mark.usefixtures('_compiled_quickly')


def state(workdir: pathlib.Path) -> Any:
    return checkpoint_reader.load(workdir, 'state').tree


def same_bits(a: Any, b: Any) -> bool:
    leaves = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(leaves))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns the workdir of a finished run on the digits, with a report."""
    folder = tmp_path_factory.mktemp('run')
    keys = SHORT | {'eval.split': 0.2, 'eval.baselines': True, 'log.report': True}
    run = simsiam_jax.pretrain(folder, IMAGES, labels=LABELS, **keys)
    assert run.finished
    return folder


@pytest.fixture(scope='module')
def encoder(workdir: pathlib.Path) -> simsiam_jax.Encoder:
    return simsiam_jax.Encoder.load(workdir)


def test_import_loads_no_other_library() -> None:
    code = 'import sys; before = set(sys.modules); import simsiam_jax; simsiam_jax.__version__\n'
    code += 'print(sorted({m.split(".")[0] for m in set(sys.modules) - before}))'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    standard = sys.stdlib_module_names
    assert set(ast.literal_eval(done.stdout)) - standard == {'simsiam_jax'}


def test_public_names_are_listed_typed_and_documented() -> None:
    tree = ast.parse((ROOT / 'simsiam_jax/__init__.py').read_text())
    checked = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = set(simsiam_jax.__all__)
    assert names == checked - {'TYPE_CHECKING', 'Any'}
    assert names <= set(dir(simsiam_jax))
    guide = (ROOT / 'docs/guides/python.md').read_text()
    for name in names - {'__version__'}:
        value = getattr(simsiam_jax, name)
        assert inspect.getdoc(value), name
        assert re.search(rf'\b{name}\b', guide), name
        members = (
            [
                getattr(x, 'fget', None) or getattr(x, '__func__', x)
                for key, x in vars(value).items()
                if not key.startswith('_')
                and (callable(x) or isinstance(x, property | classmethod))
            ]
            if inspect.isclass(value)
            else [value]
        )
        for function in members:
            assert inspect.getdoc(function), (name, function)
            typed = set(typing.get_type_hints(function))
            assert typed >= set(inspect.signature(function).parameters) - {'self', 'cls'} | {
                'return'
            }
    with pytest.raises(AttributeError, match='nothing'):
        simsiam_jax.nothing  # noqa: B018


def test_run_has_files_curves_and_verdict(workdir: pathlib.Path) -> None:
    run = simsiam_jax.pretrain(
        workdir, IMAGES, labels=LABELS, **SHORT | {'eval.split': 0.2, 'eval.baselines': True}
    )
    assert run.finished
    assert {'report.html', 'views.png', 'metrics.jsonl', 'verdict.txt'} <= set(os.listdir(workdir))
    assert 'nearest neighbors' in (workdir / 'report.html').read_text()
    assert run.curves['train/loss'][-1][0] == 12
    assert run.verdict['accuracy']['after training']['top1'] > 0.5
    assert run.encoder.size == 8


def test_interface_and_command_give_identical_states(
    command: Commands, tmp_path: pathlib.Path
) -> None:
    np.savez(tmp_path / 'digits.npz', images=IMAGES)
    keys = {key: value for key, value in SHORT.items() if key != 'config'}
    flags = [f'--config.{key}={value}' for key, value in keys.items()]
    source = f'--config.data.source=npz:{tmp_path / "digits.npz"}'
    done = command(
        'simsiam_jax.main', '--config=quickstart:3ep', f'--workdir={tmp_path / "a"}', source, *flags
    )
    assert done.returncode == 0, done.stderr
    program = (
        'import numpy as np, simsiam_jax\n'
        f'images = np.load({str(tmp_path / "digits.npz")!r})["images"]\n'
        f'simsiam_jax.pretrain({str(tmp_path / "b")!r}, images, **{SHORT!r})\n'
    )
    subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, env=environment(), check=True, timeout=600
    )
    assert same_bits(state(tmp_path / 'a'), state(tmp_path / 'b'))
    ours, theirs = (json.loads((tmp_path / x / 'config.json').read_text()) for x in 'ba')
    assert ours['data'].pop('source') == 'python:images'
    assert theirs['data'].pop('source').startswith('npz:')
    assert ours == theirs


def test_ctrl_c_saves_and_returns_and_same_call_resumes(tmp_path: pathlib.Path) -> None:
    def interrupt(step: int, encoder: simsiam_jax.Encoder, metrics: Any) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = simsiam_jax.pretrain(tmp_path / 'a', IMAGES, callbacks=[interrupt], **SHORT)
    assert not run.finished
    assert signal.getsignal(signal.SIGINT) is before
    saved = int(state(tmp_path / 'a')['step'])
    assert 7 <= saved < 18
    assert simsiam_jax.pretrain(tmp_path / 'a', IMAGES, **SHORT).finished
    simsiam_jax.pretrain(tmp_path / 'b', IMAGES, **SHORT)
    assert same_bits(state(tmp_path / 'a'), state(tmp_path / 'b'))


def test_callbacks_get_an_encoder_and_log_values(tmp_path: pathlib.Path) -> None:
    spreads = []

    def spread(step: int, encoder: simsiam_jax.Encoder, metrics: Any) -> dict[str, float]:
        assert np.isfinite(metrics['loss'])
        spreads.append(float(encoder(IMAGES[:20]).std()))
        return {'mine/spread': spreads[-1]}

    keys = SHORT | {'log.every_steps': 5}
    run = simsiam_jax.pretrain(tmp_path, IMAGES, callbacks=[spread], **keys)
    steps, logged = zip(*run.curves['mine/spread'], strict=True)
    assert steps == tuple(range(2, 19))
    np.testing.assert_allclose(logged, spreads, rtol=1e-5)
    assert len(set(spreads)) > 1


class TorchDataset:
    """Items (image, label) as PyTorch's data sets have them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index >= 40:
            raise IndexError(index)
        return Image.fromarray(IMAGES[index, :, :, 0]), int(LABELS[index])


class HuggingFaceDataset(TorchDataset):
    """Items {'image', 'label'}."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = super().__getitem__(index)
        return {'label': label, 'image': image}


def saved_paths(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = [folder / f'{i}.png' for i in range(40)]
    for path, image in zip(paths, IMAGES, strict=False):
        Image.fromarray(image[:, :, 0]).save(path)
    return paths


FORMS: dict[str, Callable[[pathlib.Path], Any]] = {
    'array without channels': lambda _: IMAGES[:40, :, :, 0],
    'array of jax': lambda _: jax.numpy.asarray(IMAGES[:40]),
    'list of arrays': lambda _: list(IMAGES[:40]),
    'list of PIL images': lambda _: [Image.fromarray(x[:, :, 0]) for x in IMAGES[:40]],
    'paths': saved_paths,
    'bytes': lambda folder: [path.read_bytes() for path in saved_paths(folder)],
    'torch data set': lambda _: TorchDataset(),
    'Hugging Face data set': lambda _: HuggingFaceDataset(),
    'folder': lambda folder: saved_paths(folder) and f'folder:{folder}',
}


@pytest.mark.parametrize('form', FORMS)
def test_encoder_takes_all_forms_of_images(
    form: str, encoder: simsiam_jax.Encoder, tmp_path: pathlib.Path
) -> None:
    features = encoder(FORMS[form](tmp_path))
    assert features.shape == (40, encoder.features)
    expected = encoder(IMAGES[:40])
    if form == 'folder':  # in the order of names
        order = sorted(range(40), key=lambda i: f'{i}.png')
        expected = expected[order]
    np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize('form', ['torch data set', 'list of arrays', 'paths'])
def test_pretrain_takes_any_form_of_images(form: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / 'images'
    folder.mkdir()
    keys = SHORT | {'config': 'quickstart:1ep', 'batch_size': 16}
    images = FORMS[form](folder)
    a = simsiam_jax.pretrain(tmp_path / 'a', images, labels=LABELS[:40], **keys)
    b = simsiam_jax.pretrain(tmp_path / 'b', IMAGES[:40], **keys)
    assert same_bits(state(pathlib.Path(a.workdir)), state(pathlib.Path(b.workdir)))


@pytest.mark.parametrize(
    ('images', 'labels', 'message'),
    [
        (IMAGES.astype(complex), None, r'images is complex128; expected integers or floats'),
        (IMAGES[0, :, :, 0], None, r'images has shape \(8, 8\); expected \[N, H, W\]'),
        (3, None, r'images is a int; expected a uint8 array'),
        ([], None, 'images is empty'),
        (IMAGES, LABELS[:3], r'labels of images are int32 of shape \(3,\); expected 400'),
        (IMAGES[:70], None, r'batch_size is 72, but .* only 70'),
        ('folder:/nowhere', None, 'image folder /nowhere does not exist'),
        ('folder:/nowhere', LABELS, 'labels are given without images'),
        ([b'no image'] * 80, None, r'80 of 80 images cannot be read|cannot be read'),
    ],
)
def test_bad_images_raise_one_line(
    images: Any, labels: Any, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(simsiam_jax.UserError, match=message) as caught:
        simsiam_jax.pretrain(tmp_path, images, labels=labels, **SHORT | {'batch_size': 72})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('keys', 'message'),
    [
        ({'optim.lr': 1}, 'unknown key config.optim.lr; did you mean config.optim.learning_rate'),
        ({'epochs': 'ten'}, "epochs is 'ten'; expected a value such as 3"),
        ({'config': 'nothing'}, 'config file nothing does not exist; pass'),
        ({'config': 'linear'}, "config is of task 'linear'; expected 'pretrain'"),
        ({'model.name': 'resnet19'}, "model.name is 'resnet19'; did you mean"),
        ({'optim.learning_rate': 1e9}, 'the loss is|weights are not finite'),
    ],
)
def test_bad_configuration_raises_one_line(
    keys: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(simsiam_jax.UserError, match=message) as caught:
        simsiam_jax.pretrain(tmp_path, IMAGES, **SHORT | keys)
    assert '\n' not in str(caught.value)


def test_run_on_images_in_python_is_not_resumed_by_command(
    command: Commands, workdir: pathlib.Path
) -> None:
    flags = f'--workdir={workdir}', '--config.data.source=python:images'
    done = command('simsiam_jax.main', '--config=quickstart', *flags)
    assert done.returncode == 1
    assert 'source is python:images, images that were given to a function' in done.stderr


def test_encoder_knows_its_images(encoder: simsiam_jax.Encoder) -> None:
    facts = encoder.size, encoder.resize, encoder.mean, encoder.std, encoder.channels
    assert facts == (8, 0, (0.0,), (0.38,), 1)
    normalized = encoder.normalize(IMAGES[:3])
    np.testing.assert_allclose(normalized, IMAGES[:3] / 255 / 0.38, rtol=1e-6)
    direct = encoder.module.apply(encoder.variables, normalized)
    np.testing.assert_allclose(encoder(IMAGES[:3]), direct, atol=1e-5)


def test_encoder_resizes_and_crops(encoder: simsiam_jax.Encoder) -> None:
    config = encoder.config | {'eval': encoder.config['eval'] | {'resize': 10}}
    resizing = dataclasses.replace(encoder, config=config)
    large = np.repeat(np.repeat(IMAGES[:4], 5, 1), 5, 2)  # each pixel 5x5
    wide = [np.pad(large[0], ((0, 0), (10, 10), (0, 0))), *large[1:]]
    features = resizing(wide)
    assert features.shape == (4, encoder.features)
    for image, feature in zip(wide, features, strict=True):
        height, width, _ = image.shape
        rows, columns = 10, 10 * width // height
        small = geometry.crop_resize(image, 0, 0, height, width, rows, columns)
        top, left = 1, round((columns - 8) / 2)
        crop = small[top : top + 8, left : left + 8]
        np.testing.assert_allclose(feature, encoder(crop[None])[0], atol=1e-5)


def test_encoder_runs_on_chosen_devices(encoder: simsiam_jax.Encoder) -> None:
    every = encoder(IMAGES[:50])
    one = encoder(IMAGES[:50], batch_size=7, devices=jax.devices()[3:4])
    np.testing.assert_allclose(every, one, atol=1e-5)


def test_encoder_names_unreadable_images(encoder: simsiam_jax.Encoder) -> None:
    for function in (encoder, encoder.feature_maps):
        with pytest.raises(simsiam_jax.UserError, match=r'1 of 3 images cannot be read .*s\[1\]'):
            function([IMAGES[0], b'damaged', IMAGES[1]])
        with pytest.raises(simsiam_jax.UserError, match=r'can(not)? be read.*expected \[H, W, 1\]'):
            function(np.repeat(IMAGES[:3], 5, 3))


def test_features_of_deep_images_do_not_depend_on_others(
    encoder: simsiam_jax.Encoder, tmp_path: pathlib.Path
) -> None:
    encoder.save(tmp_path / 'encoder.safetensors', 'state_dict')
    deep = IMAGES[:4].astype(np.uint16) * np.array([1, 16, 64, 257], np.uint16)[:, None, None, None]
    for loaded in (encoder, simsiam_jax.Encoder.load(tmp_path / 'encoder.safetensors')):
        together = loaded(deep)
        np.testing.assert_allclose(loaded(deep[:1]), together[:1], atol=1e-5)


def test_feature_maps_are_those_of_the_stages(encoder: simsiam_jax.Encoder) -> None:
    maps = encoder.feature_maps(IMAGES[:30], batch_size=16)
    shapes = {name: x.shape for name, x in maps.items()}
    assert shapes == {'layer1': (30, 8, 8, 8), 'layer2': (30, 4, 4, 16), 'layer3': (30, 2, 2, 32)}
    np.testing.assert_allclose(maps['layer3'].mean((1, 2)), encoder(IMAGES[:30]), atol=1e-5)


def test_similar_finds_the_copy(encoder: simsiam_jax.Encoder) -> None:
    images = np.concatenate([IMAGES[:30], IMAGES[:1]])
    positions, similarities = encoder.similar(images, k=3)
    assert positions.shape == similarities.shape == (31, 3)
    assert positions[0, 0] == 30
    assert positions[30, 0] == 0
    assert similarities[0, 0] == pytest.approx(1, abs=1e-5)
    with pytest.raises(simsiam_jax.UserError, match='expected 1 to 30'):
        encoder.similar(images, k=31)


def test_saved_encoder_loads_again(encoder: simsiam_jax.Encoder, tmp_path: pathlib.Path) -> None:
    report = encoder.save(tmp_path / 'encoder.safetensors', 'state_dict')
    assert 'for images of size 8' in report
    again = simsiam_jax.Encoder.load(tmp_path / 'encoder.safetensors')
    assert same_bits(again.variables, encoder.variables)
    np.testing.assert_array_equal(again(IMAGES[:9]), encoder(IMAGES[:9]))
    with pytest.raises(simsiam_jax.UserError, match='--format is'):
        encoder.save(tmp_path / 'x', 'nothing')


def test_evaluate_compares_with_baselines(encoder: simsiam_jax.Encoder) -> None:
    names = np.array([f'digit {label}' for label in LABELS])
    report = simsiam_jax.evaluate(
        encoder, train=(IMAGES[:300], names[:300]), test=(list(IMAGES[300:]), names[300:])
    )
    for verdict in (report.knn, report.linear):
        accuracy = verdict.result['accuracy']
        assert set(accuracy) == {'raw pixels', 'random initialization', 'checkpoint'}
        assert accuracy['checkpoint']['top1'] > 0.5
        assert verdict.result['images'] == 100
    assert 'linear probe top-1 of 100 test images in 10 classes' in str(report)


def test_evaluate_refuses_sets_without_labels(encoder: simsiam_jax.Encoder) -> None:
    with pytest.raises(simsiam_jax.UserError, match=r'train has 1 parts; expected \(images, lab'):
        simsiam_jax.evaluate(encoder, train=[IMAGES], test=(IMAGES, LABELS))
    with pytest.raises(simsiam_jax.UserError, match='no labels'):
        simsiam_jax.evaluate(encoder, train='digits/train', test=(IMAGES, None))


def test_doctor_gives_findings_and_advice() -> None:
    bands = np.repeat(IMAGES, 5, 3)
    examined = simsiam_jax.doctor(bands, epochs=7)
    errors = [str(finding) for finding in examined.findings if finding.severity == 'error']
    assert not examined.starts
    assert '400 have 5 channels, not 3' in ' '.join(errors)
    assert '400 have 5 channels, not 3' in str(examined)
    advice = {a.key: a.value for a in examined.advice}
    assert advice['data.channels'] == 5
    assert advice == simsiam_jax.advice(bands, epochs=7)
    assert 'epochs' in {a.key for a in examined.kept}
    assert simsiam_jax.doctor(bands, **advice).starts


def test_images_are_found_only_within_the_context() -> None:
    source = python_sources.open_images(IMAGES)
    with python_sources.provide(images=source):
        assert sources.open_source('python:images') is source
        part = sources.open_source('split:0.2/test:python:images')
        assert 0 < len(part) < len(source)
    with pytest.raises(simsiam_jax.UserError, match='source is python:images'):
        sources.open_source('python:images')


def test_identity_depends_on_the_images() -> None:
    def digest(images: Any) -> str:
        return sources.fingerprint(python_sources.open_images(images))['digest']

    changed = [IMAGES[0], *IMAGES[2:40], IMAGES[1]]
    assert digest(list(IMAGES[:40])) == digest(list(IMAGES[:40].copy()))
    assert digest(changed) != digest(list(IMAGES[:40]))
    assert digest(IMAGES[:39]) != digest(IMAGES[:40])


def test_examples_of_guide_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / 'docs/guides/python.md').read_text()
    pretraining, fine_tuning = re.findall(r'```python\n(.*?)```', text, re.DOTALL)[:2]
    names: dict[str, Any] = {}
    smaller = {'epochs=50': 'epochs=3', '1400': '400', 's.images': 's.images[:500]'}
    smaller['s.target'] = 's.target[:500]'
    for code in (pretraining, fine_tuning):
        for large, small in smaller.items():
            code = code.replace(large, small)
        exec(code, names)
    assert names['features'].shape == (500, 64)
    assert names['report'].linear.result['images'] == 100
    backbone = names['model'].backbone
    before = names['encoder'].variables
    for part in ('params', 'batch_stats'):
        changed = jax.tree.map(
            lambda x, y: bool(np.any(np.asarray(x) != y)), backbone.variables[part], before[part]
        )
        assert all(jax.tree.leaves(changed)), part
    assert names['accuracy'] > 0.7


def test_nnx_module_has_the_same_features_to_the_bit(encoder: simsiam_jax.Encoder) -> None:
    normalized = encoder.normalize(IMAGES[:16])
    backbone = encoder.to_nnx()
    features = encoder.module.apply(encoder.variables, normalized)
    assert same_bits(backbone(normalized), features)
    expected, updates = encoder.module.apply(
        encoder.variables, normalized, train=True, mutable=['batch_stats']
    )
    assert same_bits(backbone(normalized, train=True), expected)
    assert same_bits(backbone.variables['batch_stats'], updates['batch_stats'])
    assert not same_bits(backbone.variables['batch_stats'], encoder.variables['batch_stats'])
    tuned = dataclasses.replace(encoder, variables=backbone.variables)
    np.testing.assert_allclose(tuned(IMAGES[:16]), backbone(normalized), atol=1e-5)


def test_exported_program_needs_only_jax(
    encoder: simsiam_jax.Encoder, tmp_path: pathlib.Path
) -> None:
    encoder.save(tmp_path / 'encoder.jax_export', 'jax_export')
    np.save(tmp_path / 'images.npy', IMAGES[:5])
    program = (
        'import sys, jax, numpy as np\n'
        'exported = jax.export.deserialize(open("encoder.jax_export", "rb").read())\n'
        'assert exported.platforms == ("cpu", "cuda", "tpu"), exported.platforms\n'
        'images = np.load("images.npy")\n'
        'features = [exported.call(images[:n]) for n in (5, 2)]\n'
        'assert "flax" not in sys.modules\n'
        'np.savez("features.npz", *features)\n'
    )
    subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, env=environment(), check=True, timeout=300
    )
    with np.load(tmp_path / 'features.npz') as features:
        for name, n in (('arr_0', 5), ('arr_1', 2)):
            np.testing.assert_allclose(features[name], encoder(IMAGES[:n]), atol=1e-5)


def test_hugging_face_folder_has_a_model_card_and_loads(
    encoder: simsiam_jax.Encoder, tmp_path: pathlib.Path
) -> None:
    encoder.save(tmp_path / 'hub', 'huggingface')
    card = (tmp_path / 'hub/README.md').read_text()
    assert card.startswith('---\nlibrary_name: simsiam_jax\n')
    for part in ('| size | 8 |', '| std | [0.38] |', '| after training | 0.', 'better than'):
        assert part in card
    assert '"learning_rate": 0.8' in card
    assert 'python:images' not in card
    assert 'timm' not in card  # timm has no network of these widths
    again = simsiam_jax.Encoder.load(tmp_path / 'hub')
    assert again.mean == encoder.mean
    assert same_bits(again.variables, encoder.variables)


def test_folders_train_and_evaluate_without_tensorflow(tmp_path: pathlib.Path) -> None:
    for i, image in enumerate(IMAGES[:120]):
        path = tmp_path / f'images/{LABELS[i]}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image[:, :, 0]).resize((9 + i % 3, 10))  # not for the device
        picture.save(path)
    absent = ['tensorflow', 'tensorflow_datasets', 'array_record', 'clu', 'tensorboard']
    keys = SHORT | {'batch_size': 32, 'eval.split': 0.2, 'eval.resize': 8, 'log.report': True}
    program = (
        f'import sys; sys.modules.update(dict.fromkeys({absent!r}))\n'
        'import simsiam_jax\n'
        f'run = simsiam_jax.pretrain("run", "folder:images", **{keys!r})\n'
        'features = run.encoder("folder:images")\n'
        'simsiam_jax.evaluate(run.encoder, "folder:images", "folder:images")\n'
        f'assert simsiam_jax.doctor("folder:images", **{keys!r}).starts\n'
        'run.encoder.save("encoder.safetensors", "state_dict")\n'
        'assert features.shape == (120, 32)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run/report.html').exists()
