"""Tests of runtime/distributed.py and runtime/launchers.py: runs of several processes."""

import concurrent.futures
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import kills
import numpy as np
import pytest
from commands import environment

from simsiam_jax import config, errors
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.logs import writers
from simsiam_jax.runtime import distributed, launchers
from simsiam_jax.runtime.launchers import ClusterSpec
from simsiam_jax.tasks import inputs

ROOT = pathlib.Path(__file__).parent.parent
METHODS = ('simsiam', 'moco_v2')
# Trains with each method for five steps and saves values that must not depend on the number of
# processes. At quickstart.py's own learning rate, five steps of such a small net would multiply
# rounding errors by ten thousand.
PROBE = """
import hashlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
sys.path.insert(0, 'configs')
import quickstart
from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.logs import writers
from simsiam_jax.runtime import distributed, launchers
from simsiam_jax.tasks import pretrain_setup
from simsiam_jax.tasks.features import extract_features
from simsiam_jax.training import step
from simsiam_jax.training import mesh as mesh_lib

out, port, num_processes, process_id, *methods = sys.argv[1:]
cluster = launchers.ClusterSpec(f'127.0.0.1:{port}', int(num_processes), int(process_id))
distributed.start(cluster, timeout=60)
results = {}
for method in methods:
    config = quickstart.get_config(method)
    config.update_from_flattened_dict(
        {'model.width_multiplier': 0.125, 'model.stages': (1,), 'optim.learning_rate': 0.05}
    )
    run = pretrain_setup.build(config)
    train_step = step.make_train_step(run.method, run.tx, run.mesh, run.to_views)
    state = mesh_lib.replicate(run.init(), run.mesh)
    losses, digest = [], hashlib.sha256()
    for batch in run.batches(0, 5):
        for x in jax.tree.leaves(multihost_utils.process_allgather(batch, tiled=True)):
            digest.update(np.ascontiguousarray(x).tobytes())
        state, metrics = train_step(state, batch)
        losses.append(float(metrics['loss']))
    variables = checkpoint.encoder_variables(state)
    features = extract_features(run.encode, variables, run.knn.test, run.knn.loader, l2=True).x
    queue = np.zeros(0) if state.method_state is None else jax.device_get(state.method_state)
    values = {'losses': losses, 'digest': digest.hexdigest(), 'features': features, 'queue': queue}
    results |= {f'{method} {name}': value for name, value in values.items()}
if jax.process_index() == 0:
    np.savez(out, **results)
if jax.process_count() > 1:
    jax.distributed.shutdown()
"""


@pytest.fixture(scope='module')
def probed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    """Results of PROBE on four devices in one process and in two, by 'METHOD NAME'."""
    folder, port = tmp_path_factory.mktemp('probed'), kills.free_port()
    started = [
        subprocess.Popen(
            [
                *(sys.executable, '-c', PROBE, folder / f'{num_processes}.npz'),
                *map(str, (port, num_processes, process_id)),
                *METHODS,
            ],
            cwd=ROOT,
            env=environment(4 // num_processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for num_processes, process_id in ((1, 0), (2, 0), (2, 1))  # at once, to use all cores
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], '\n'.join(outputs)
    results = []
    for num_processes in (1, 2):
        with np.load(folder / f'{num_processes}.npz') as arrays:
            results.append(dict(arrays))
    return results


@pytest.mark.parametrize('method', METHODS)
def test_two_processes_train_like_one(method: str, probed) -> None:
    def both(name: str) -> list[np.ndarray]:
        return [results[f'{method} {name}'] for results in probed]

    digests, losses, features, queues = map(both, ('digest', 'losses', 'features', 'queue'))
    assert digests[0] == digests[1]
    np.testing.assert_allclose(losses[1][0], losses[0][0], rtol=0, atol=1e-6)
    assert features[0].shape == features[1].shape == (360, 8)
    assert np.std(features[0]) > 1e-2
    np.testing.assert_allclose(features[1], features[0], rtol=0, atol=1e-4)
    assert len(queues[0]) == (1024 if method == 'moco_v2' else 0)
    np.testing.assert_allclose(queues[1], queues[0], rtol=0, atol=1e-4)


def test_two_processes_stop_together_and_one_resumes(tmp_path) -> None:
    metrics, log = tmp_path / 'metrics.jsonl', tmp_path / 'process0.log'

    def start(processes: int) -> list[subprocess.Popen]:
        """Starts the run and waits for four more steps."""
        before = metrics.read_text().count('\n') if metrics.exists() else 0
        started = kills.start(tmp_path, processes, '--config.epochs=40')
        deadline = time.monotonic() + kills.LIMIT
        while started[0].poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count('\n') >= before + 4:
                break
            time.sleep(0.05)
        return started

    # One process dies: the other exits in bounded time, prints why, and launchers may restart it.
    started = start(2)
    started[1].kill()
    assert kills.end(started) == [75, -signal.SIGKILL], log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith('error: JaxRuntimeError in process 0 of 2: ')
    assert last.endswith('rerun the same command to resume from the last checkpoint')

    # SIGTERM reaches one process: both save the same step.
    started = start(2)
    started[1].send_signal(signal.SIGTERM)
    assert kills.end(started) == [143, 143], log.read_text()
    step = int(re.search(r'stop requested: saved step (\d+)', log.read_text())[1])
    assert checkpoint_reader.load(tmp_path, 'state').step == step >= 5
    assert 'loss' not in (tmp_path / 'process1.log').read_text()  # only process 0 prints

    started = start(1)  # from two processes to one
    started[0].send_signal(signal.SIGTERM)
    assert kills.end(started) == [143]
    assert f'resuming from step {step} in' in log.read_text()


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        ({'count': 65}, r'process 0 on a, process 1 on b: 67; process 2 on c: 65'),
        ({'digest': 'y'}, r'process 1 on b: 67 of other names; process 2 on c: 67 of other names'),
    ],
)
def test_processes_that_see_other_images_are_named(other, message, monkeypatch) -> None:
    same = {'count': 67, 'digest': 'x'}
    gathered = [same | {'host': 'a'}, same | {'host': 'b'}, same | other | {'host': 'c'}]
    monkeypatch.setattr(distributed, 'gather', lambda own: gathered)
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    with pytest.raises(errors.UserError, match=f'different images in digits/train .*{message}'):
        inputs.open_source('digits/train', config.default().data)
    gathered[2] = same | {'host': 'c'}
    assert len(inputs.open_source('digits/train', config.default().data)) == 1437


def differences(names: list[str], others: list[str], monkeypatch) -> list[str]:
    """Returns what two processes print; each is a thread."""
    barrier, values = threading.Barrier(2), {}

    def gather(own):
        values[threading.get_ident()] = own
        barrier.wait(10)
        both = [values[process] for process in order]
        barrier.wait(10)
        return both

    order: list[int] = []

    def run(own: list[str]) -> str:
        order.append(threading.get_ident())
        barrier.wait(10)
        return inputs._first_difference(own, max(len(names), len(others)))

    monkeypatch.setattr(distributed, 'gather', gather)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, names)
        while not order:
            time.sleep(0.001)
        second = threads.submit(run, others)
        return [first.result(10), second.result(10)]


@pytest.mark.parametrize('count', [1, 2, 63, 64, 65, 5000])
def test_first_difference_of_names_is_found(count, monkeypatch) -> None:
    names = [f'{i}.png' for i in range(count)]
    at = count * 2 // 3
    for other in (names[:at] + names[at + 1 :], [*names[:at], 'x.png', *names[at + 1 :]]):
        results = differences(names, other, monkeypatch)
        assert f'{at}.png in process 0' in results[0]
        assert results[0] == results[1]
    assert differences(names, names, monkeypatch)[0] == ''


@pytest.mark.long
def test_processes_that_see_other_images_stop_within_seconds(tmp_path) -> None:
    with np.load(ROOT / 'tests' / 'figures' / 'cifar10.npz') as file:
        for process, count in enumerate((64, 63)):
            np.savez(tmp_path / f'{process}.npz', images=file['train_images'][:count])
    begin, port = time.monotonic(), kills.free_port()
    started = [
        subprocess.Popen(
            [
                *(sys.executable, '-m', 'simsiam_jax.main', '--config=configs/folder.py'),
                f'--workdir={tmp_path}/run',
                f'--config.data.source=npz:{tmp_path}/{process}.npz',
                *(f'--coordinator=127.0.0.1:{port}', '--num_processes=2', '--timeout=60'),
                f'--process_id={process}',
            ],
            cwd=ROOT,
            env=environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [1, 1], '\n'.join(outputs)
    assert all('see different images' in output for output in outputs)
    assert time.monotonic() - begin < 60


def test_unreadable_images_of_all_processes_are_written_once_each(tmp_path, monkeypatch) -> None:
    others = {'b.png': 'empty', 'c.png': 'truncated'}
    monkeypatch.setattr(
        distributed, 'gather', lambda own: [own, 2 if isinstance(own, int) else others]
    )
    with writers.MetricWriter(str(tmp_path), tensorboard=False, step=0) as log:
        log.bad_images({'a.png': 'empty', 'c.png': 'truncated'})
    names = [line.split('\t')[0] for line in (tmp_path / 'bad_images.txt').read_text().splitlines()]
    assert names == ['a.png', 'b.png', 'c.png']


@pytest.mark.parametrize(
    ('action', 'stops'), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)], ids=['default', 'nohup']
)
def test_closed_terminal_requests_stop_unless_ignored(action, stops) -> None:
    previous = signal.signal(signal.SIGHUP, action)
    try:
        with distributed.PreemptionHandler() as preemption:
            assert not preemption.should_stop(1)
            os.kill(os.getpid(), signal.SIGHUP)
            assert preemption.should_stop(2) == stops
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.long
def test_silent_process_stops_the_others_in_bounded_time(tmp_path) -> None:
    started = kills.start(tmp_path, 2, '--config.epochs=1000')
    kills.await_moment('step', tmp_path, started)
    started[1].send_signal(signal.SIGSTOP)
    try:
        assert started[0].wait(timeout=kills.LIMIT) == -signal.SIGABRT  # launchers restart it
    finally:
        started[1].kill()
        started[1].wait()
    log = (tmp_path / 'process0.log').read_text()
    assert 'stopped sending heartbeats' in log
    assert 'Thread 0x' not in log


@pytest.mark.long
def test_killed_runs_resume_to_the_same_end(tmp_path) -> None:
    counts = kills.run(2, 1, tmp_path, '--config.epochs=6')
    assert counts.total() == 2


def test_rendezvous_names_missing_process_in_bounded_time() -> None:
    coordinator = f'127.0.0.1:{kills.free_port()}'
    messages = {}

    def connect(process_id: int) -> None:
        try:
            distributed.rendezvous(ClusterSpec(coordinator, 4, process_id), timeout=3)
        except distributed.MissingProcessError as error:
            messages[process_id] = str(error)

    threads = [threading.Thread(target=connect, args=[process_id]) for process_id in (0, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(messages) == {0, 1, 2}
    assert set(messages.values()) == {messages[0]}
    assert 'only 3 of 4 processes connected' in messages[0]
    assert '(ranks 0, 1, 2); missing ranks: 3. ' in messages[0]


def test_rendezvous_accepts_processes_in_any_order() -> None:
    coordinator = f'127.0.0.1:{kills.free_port()}'
    connected = []

    def connect(process_id: int) -> None:
        distributed.rendezvous(ClusterSpec(coordinator, 3, process_id), timeout=60)
        connected.append(process_id)

    threads = [threading.Thread(target=connect, args=[process_id]) for process_id in (2, 0, 1)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(connected) == [0, 1, 2]


SLURM = {
    'SLURM_JOB_ID': '8193',
    'SLURM_STEP_NUM_TASKS': '4',
    'SLURM_PROCID': '3',
    'SLURM_TASK_PID': str(os.getpid()),
}
MPI = {
    'OMPI_COMM_WORLD_SIZE': '2',
    'OMPI_COMM_WORLD_RANK': '1',
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
    'PMIX_SERVER_TMPDIR': '/tmp',
}
GIVEN = {'JAX_COORDINATOR_ADDRESS': 'pod-0:1234', 'JAX_NUM_PROCESSES': '8'}


@pytest.mark.parametrize(
    ('env', 'cluster'),
    [
        ({}, None),
        (SLURM | {'SLURM_STEP_NODELIST': 'node[007-9,12],b1'}, ClusterSpec('node007:61441', 4, 3)),
        (
            SLURM | {'SLURM_STEP_NODELIST': 'gpu-r[1-2]-n[01-04]'},
            ClusterSpec('gpu-r1-n01:61441', 4, 3),
        ),
        (SLURM | {'SLURM_STEP_NODELIST': 'a,b[1-3]'}, ClusterSpec('a:61441', 4, 3)),
        # A batch script without srun; a shell that outlived its job; one task.
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, None),
        (SLURM | {'SLURM_STEP_NODELIST': 'a', 'SLURM_TASK_PID': '99999999'}, None),
        (SLURM | {'SLURM_STEP_NODELIST': 'a', 'SLURM_STEP_NUM_TASKS': '1'}, None),
        (MPI, ClusterSpec(f'10.96.0.1:{61440 + 1531576320 // 4096 % 4096}', 2, 1)),
        (MPI | {'PMIX_SERVER_TMPDIR': '/no/such'}, None),
        # mpirun within a SLURM job of three hosts starts two agents of its own on the other hosts.
        (
            SLURM | {'SLURM_STEP_NODELIST': 'n[2-3]', 'SLURM_STEP_NUM_TASKS': '2'} | MPI,
            ClusterSpec(f'10.96.0.1:{61440 + 1531576320 // 4096 % 4096}', 2, 1),
        ),
        (GIVEN | {'JAX_PROCESS_ID': '2'}, ClusterSpec('pod-0:1234', 8, 2)),
        (GIVEN | {'JOB_COMPLETION_INDEX': '5'}, ClusterSpec('pod-0:1234', 8, 5)),
    ],
)
def test_launchers_are_found_only_while_alive(env: dict, cluster: ClusterSpec | None) -> None:
    assert launchers.from_environment(env) == cluster


def _tasks(host: str, local: int, **more: str) -> dict[str, str]:
    return {'SLURM_GTIDS': host, 'SLURM_LOCALID': str(local)} | more


MPI_LOCAL = MPI | {'OMPI_COMM_WORLD_LOCAL_SIZE': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': '1'}


# Variables as set by srun of SLURM 22.05, with device files in place of GPUs, and by mpirun of Open
# MPI 4.1. The flags are srun's.
@pytest.mark.parametrize(
    ('env', 'devices'),
    [
        ({}, None),
        # --ntasks-per-node=1 --gpus-per-node=8
        (_tasks('1', 0, CUDA_VISIBLE_DEVICES='0,1,2,3,4,5,6,7', SLURM_GPUS_ON_NODE='8'), None),
        # --ntasks-per-node=2 --gpus-per-node=2, and without GPUs known to SLURM
        (_tasks('2,3', 1, CUDA_VISIBLE_DEVICES='0,1', SLURM_GPUS_ON_NODE='2'), [1]),
        (_tasks('2,3', 1), [1]),
        # -n3 --gpus-per-task=1, -n2 --gpus-per-task=2
        (_tasks('0,1,2', 2, CUDA_VISIBLE_DEVICES='2', SLURM_GPUS_ON_NODE='3'), None),
        (_tasks('0,1', 1, CUDA_VISIBLE_DEVICES='2,3', SLURM_GPUS_ON_NODE='4'), None),
        (MPI_LOCAL, [1]),
        (MPI_LOCAL | {'CUDA_VISIBLE_DEVICES': '1'}, None),
        (MPI_LOCAL | {'CUDA_VISIBLE_DEVICES': '0,1'}, [1]),
        (MPI_LOCAL | {'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, None),
        (MPI_LOCAL | {'PMIX_SERVER_TMPDIR': '/no/such'}, None),
        (MPI_LOCAL | _tasks('0', 0), [1]),
        (MPI_LOCAL | GIVEN, None),
    ],
)
def test_process_uses_one_gpu_on_shared_host_else_all(env: dict, devices: list | None) -> None:
    assert launchers.local_devices(env) == devices


def test_invalid_cluster_settings_raise_user_errors() -> None:
    with pytest.raises(errors.UserError, match='JAX_NUM_PROCESSES and JAX_PROCESS_ID'):
        launchers.from_environment({'JAX_COORDINATOR_ADDRESS': 'a:1'})
    with pytest.raises(errors.UserError, match='Open MPI 5 sets none'):
        launchers.from_environment(MPI | {'OMPI_MCA_orte_hnp_uri': ''})
    with pytest.raises(errors.UserError, match='process_id is 2; expected 0 to 1, because'):
        distributed.start(ClusterSpec('a:1', 2, 2))
    with pytest.raises(errors.UserError, match="'a'; expected HOST:PORT"):
        distributed.start(ClusterSpec('a', 2, 1))
    distributed.start(ClusterSpec('a:1', 1, 0))  # a single process does not wait
