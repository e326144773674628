"""Tests of launch/: what the launchers run, restart and requeue."""

import glob
import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import pytest
from commands import environment

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.runtime import distributed, host_list, launchers

ROOT = pathlib.Path(__file__).parent.parent
RUN = ['--config=configs/quickstart.py', '--workdir=gs://bucket/run']


def launch(script: str, *args: str, timeout: int = 60, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ['bash', f'launch/{script}', *args],
        cwd=ROOT,
        env=environment() | {'PYTHON': sys.executable} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ('script', 'args', 'env', 'expected'),
    [
        ('local.sh', ['-n', '2'], {'PORT': '5000'}, '--coordinator=127.0.0.1:5000'),
        ('gpu_host.sh', [], {}, 'JAX sees no GPU'),
        ('slurm.sbatch', [], {}, "'srun' '--wait=300'"),
        (
            'tpu_pod.sh',
            [],
            {'NAME': 'n', 'ZONE': 'z', 'TYPE': 'v4-32', 'SPOT': '1'},
            'tpu-vm create n --zone=z --accelerator-type=v4-32',
        ),
    ],
)
def test_dry_run_prints_the_command_of_the_run(script, args, env, expected) -> None:
    done = launch(script, *args, *RUN, DRY_RUN='1', **env)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    runs = [line for line in done.stdout.splitlines() if 'simsiam_jax.main' in line]
    assert all(flag in line for line in runs for flag in RUN)
    assert len(runs) == (2 if script == 'local.sh' else 1)


@pytest.mark.parametrize(
    ('script', 'args', 'env'),
    [
        ('local.sh', ['-n', '2'], {}),
        ('gpu_host.sh', [], {}),
        ('slurm.sbatch', [], {}),
        ('tpu_pod.sh', [], {'NAME': 'n', 'ZONE': 'z', 'TYPE': 'v4-32'}),
    ],
)
def test_launchers_pass_on_dashes_before_the_flags(
    script: str, args: list[str], env: dict[str, str]
) -> None:
    done = launch(script, *args, '--', *RUN, DRY_RUN='1', **env)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if 'simsiam_jax.main' in line)
    passed = line.replace("'", '').partition('simsiam_jax.main ')[2]
    assert passed.startswith(f'-- {RUN[0]}')  # test_command_line.py has how the program takes them


def test_launchers_print_what_is_missing() -> None:
    assert 'usage' in launch('local.sh', *RUN).stderr
    assert 'usage' in launch('slurm.sbatch').stderr
    pod = launch('tpu_pod.sh', '--workdir=/tmp/x', NAME='n', ZONE='z', TYPE='t', DRY_RUN='1')
    assert pod.returncode == 1
    assert 'must be in a bucket' in pod.stderr


@pytest.mark.long
def test_local_trains_with_two_processes(tmp_path: pathlib.Path) -> None:
    flags = ['--config.epochs=1', '--config.model.width_multiplier=0.125']
    flags += [
        '--config.log.tensorboard=False',
        '--config.log.report=False',
        '--config.eval.train=',
        '--config.eval.test=',
    ]
    done = launch(
        'local.sh',
        '-n',
        '2',
        RUN[0],
        f'--workdir={tmp_path}',
        *flags,
        timeout=300,
        MAX_RESTARTS='0',
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('batch 128 on 2 x cpu') == 1  # only process 0 prints
    assert checkpoint_reader.load(tmp_path, 'state').step == 11


def test_local_restarts_dying_runs_but_not_user_errors(tmp_path: pathlib.Path) -> None:
    program = tmp_path / 'program'
    count = tmp_path / 'count'
    for code, starts in ((75, 3), (1, 1), (0, 1)):
        program.write_text(f'#!/bin/sh\necho >> {count}\nexit {code}\n')
        program.chmod(0o755)
        count.write_text('')
        done = launch('local.sh', '-n', '1', *RUN, PYTHON=str(program), MAX_RESTARTS='2')
        assert done.returncode == code
        assert len(count.read_text()) == starts


def put(program: pathlib.Path, text: str) -> None:
    program.write_text('#!/bin/bash\n' + text)
    program.chmod(0o755)


def path(folder: pathlib.Path) -> str:
    return f'{folder}:{os.environ["PATH"]}'


@pytest.mark.parametrize(
    ('codes', 'count', 'code', 'requeued'),
    [
        ((0, 0), 0, 0, False),
        ((143, 143), 0, 143, True),
        ((75, 137), 0, 137, True),
        ((75, 1), 0, 1, False),
        ((1, 143), 1, 1, False),
        ((75, 75), 2, 75, False),
    ],
)
def test_slurm_requeues_all_runs_but_user_errors(tmp_path, codes, count, code, requeued) -> None:
    log = tmp_path / 'log'
    put(tmp_path / 'task', 'exit $CODE\n')
    # Like srun: runs all tasks and exits with the highest code.
    put(
        tmp_path / 'srun',
        f'shift; top=0; for CODE in {codes[0]} {codes[1]}; do export CODE; "$@"; c=$?\n'
        '((c <= top)) || top=$c; done; exit $top\n',
    )
    put(tmp_path / 'scontrol', f'echo "$@" >> {log}\n')
    env = {'PATH': path(tmp_path), 'PYTHON': str(tmp_path / 'task'), 'SLURM_JOB_ID': '7'}
    done = launch('slurm.sbatch', *RUN, MAX_RESTARTS='2', SLURM_RESTART_COUNT=str(count), **env)
    assert done.returncode == code, done.stderr
    assert (log.exists() and log.read_text()) == (requeued and 'requeue 7\n')


@pytest.mark.parametrize(
    ('given', 'hosts'),
    [
        ('tux', 'tux'),
        ('tux7.example.org,login', 'tux7.example.org login'),
        ('lx[15,18,32-33]', 'lx15 lx18 lx32 lx33'),
        ('linux[08-11]', 'linux08 linux09 linux10 linux11'),
        ('n[99-101]', 'n99 n100 n101'),
        ('n[007]', 'n007'),
        ('[1-2]', '1 2'),
        ('gpu-r[1-2]-n[01-02]', 'gpu-r1-n01 gpu-r1-n02 gpu-r2-n01 gpu-r2-n02'),
        ('rack[0-1]_blade[4,6]', 'rack0_blade4 rack0_blade6 rack1_blade4 rack1_blade6'),
        ('c[1-2]-ib.example.org', 'c1-ib.example.org c2-ib.example.org'),
        ('a,b[1-2],c-[3]d', 'a b1 b2 c-3d'),
        ('node1 node[2-3]', 'node1 node2 node3'),
        ('bgl[010x111]', 'bgl010 bgl011 bgl110 bgl111'),
        ('n[00008-00009]x[1]', 'n00008x1 n00009x1'),
    ],
)
def test_host_lists_of_slurm_are_expanded(given: str, hosts: str) -> None:
    assert list(host_list.expand(given)) == hosts.split()
    assert host_list.first_host(given, {}) == hosts.split()[0]


@pytest.mark.parametrize('given', ['', 'n[1-2', 'n[a-b]', 'n[]', 'n[1-2]]', 'n[1-]', 'n[00x111]'])
def test_malformed_host_list_is_refused(given: str) -> None:
    with pytest.raises(errors.UserError, match=r'the list of hosts is .* expected a list of SLURM'):
        list(host_list.expand(given))


def test_first_host_is_asked_of_scontrol_if_it_works(tmp_path: pathlib.Path) -> None:
    log = tmp_path / 'log'
    put(tmp_path / 'scontrol', f'echo "$@" >> {log}; echo first; echo second\n')
    env = {'PATH': path(tmp_path)}
    assert host_list.first_host('n[1-2]', env) == 'first'
    assert log.read_text() == 'show hostnames n[1-2]\n'
    put(tmp_path / 'scontrol', 'exit 1\n')
    assert host_list.first_host('n[1-2]', env) == 'n1'


@pytest.mark.parametrize(
    ('vendor', 'device', 'category', 'found'),
    [
        ('0x1ae0', '0x0063', '0xff0000', True),  # v5e
        ('0x1ae0', '0x0099', '0x120000', True),  # an accelerator of the future
        ('0x1ae0', '0x0042', '0x020000', False),  # gVNIC, the network card of Google's machines
        ('0x10de', '0x2330', '0x030200', False),  # H100
    ],
)
def test_tpu_is_found_on_the_bus(
    vendor: str, device: str, category: str, found: bool, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    for name, value in (('vendor', vendor), ('device', device), ('class', category)):
        (tmp_path / '0000:00:05.0').mkdir(exist_ok=True)
        (tmp_path / '0000:00:05.0' / name).write_text(f'{value}\n')
    assert launchers.has_tpu(str(tmp_path)) == found


def test_start_needs_no_cluster_with_libtpu_but_no_tpu(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    monkeypatch.setattr(glob, 'glob', lambda pattern: ['/dev/vfio/vfio'])
    monkeypatch.setattr(launchers, 'from_environment', lambda env: None)
    started: list[dict] = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **options: started.append(options))
    monkeypatch.setattr(pathlib.Path, 'glob', lambda folder, pattern: iter([]))
    distributed.start()
    assert started == []
    monkeypatch.setattr(launchers, 'has_tpu', lambda: True)
    distributed.start(timeout=7)
    assert started == [{'initialization_timeout': 7, 'heartbeat_timeout_seconds': 7}]


# Simulates a slice. `state` holds its state, `full` makes one creation fail, and each run reads a
# line of `plan`: its exit code and the state afterwards.
GCLOUD = """
cd "$(dirname "$0")"
verb=$4
[[ $* == *simsiam_jax.main* ]] && verb=run
[[ $verb == describe ]] || echo $verb >> calls
case $verb in
  describe) cat state ;;
  create) if [[ -e full ]]; then rm full; exit 1; fi; echo READY > state ;;
  delete) rm state ;;
  run)
    echo "${*: -1}" > command
    read -r code state < plan
    sed -i 1d plan
    if [[ $state == FULL ]]; then touch full; state=PREEMPTED; fi
    echo $state > state
    exit $code ;;
esac
"""


@pytest.mark.parametrize(
    ('state', 'plan', 'code', 'calls'),
    [
        (None, ['0 READY'], 0, 'create scp ssh run'),
        ('READY', ['0 READY'], 0, 'scp ssh run'),
        ('STOPPED', ['0 READY'], 0, 'delete create scp ssh run'),
        ('FULL', [], 1, 'create'),
        ('READY', ['255 PREEMPTED', '0 READY'], 0, 'scp ssh run delete create scp ssh run'),
        ('READY', ['75 READY', '0 READY'], 0, 'scp ssh run scp ssh run'),
        # 1 is an error that the user must fix, or gcloud's own code if the slice is gone.
        ('READY', ['1 READY'], 1, 'scp ssh run'),
        ('READY', ['1 PREEMPTED', '0 READY'], 0, 'scp ssh run delete create scp ssh run'),
        # No capacity for another slice at first.
        ('READY', ['255 FULL', '0 READY'], 0, 'scp ssh run delete create create scp ssh run'),
        ('READY', 3 * ['75 READY'], 75, 'scp ssh run scp ssh run scp ssh run'),
    ],
)
def test_tpu_pod_recreates_a_lost_slice(tmp_path, state, plan, code, calls) -> None:
    put(tmp_path / 'gcloud', GCLOUD)
    put(tmp_path / 'git', '')
    (tmp_path / 'plan').write_text('\n'.join([*plan, '']))
    if state == 'FULL':
        (tmp_path / 'full').touch()
    elif state:
        (tmp_path / 'state').write_text(state)
    slice_ = {'NAME': 'n', 'ZONE': 'z', 'TYPE': 't', 'PAUSE': '0', 'MAX_RESTARTS': '2'}
    flag = "--config.optim.mask='a b'"
    done = launch('tpu_pod.sh', *RUN, flag, PATH=path(tmp_path), **slice_)
    assert done.returncode == code, done.stderr
    assert (tmp_path / 'calls').read_text().split() == calls.split()
    if plan:  # the slice's shell passes the flags on unchanged
        command = (tmp_path / 'command').read_text()
        words = shlex.split(command.partition('simsiam_jax.main')[2].partition('2>&1')[0])
        assert words == [*RUN, flag]


def test_jobset_has_required_fields_and_matching_counts() -> None:
    yaml = pytest.importorskip('yaml', reason='pyyaml is not installed')
    (jobset,) = yaml.safe_load_all((ROOT / 'launch' / 'gke.yaml').read_text())
    assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
    assert jobset['kind'] == 'JobSet'
    assert jobset['spec']['failurePolicy']['maxRestarts'] > 0
    (workers,) = jobset['spec']['replicatedJobs']
    job = workers['template']['spec']
    assert job['completionMode'] == 'Indexed'  # sets JOB_COMPLETION_INDEX
    assert job['parallelism'] == job['completions'] > 1
    (rule,) = job['podFailurePolicy']['rules']
    assert rule['action'] == 'FailJob'
    assert rule['onExitCodes'] == {'containerName': 'simsiam', 'operator': 'In', 'values': [1]}
    pod = job['template']['spec']
    assert pod['restartPolicy'] == 'Never'  # required by podFailurePolicy
    (container,) = pod['containers']
    assert container['name'] == 'simsiam'
    assert container['command'] == ['python', '-m', 'simsiam_jax.main']
    env = {variable['name']: variable['value'] for variable in container['env']}
    host, port = env['JAX_COORDINATOR_ADDRESS'].split(':')
    # JobSet names a pod SET-JOB-REPLICA-POD.SET.
    assert host == '{0}-{1}-0-0.{0}'.format(jobset['metadata']['name'], workers['name'])
    cluster = launchers.from_environment(env | {'JOB_COMPLETION_INDEX': '1'})
    assert cluster == launchers.ClusterSpec(f'{host}:{port}', job['completions'], 1)
    assert [exposed['containerPort'] for exposed in container['ports']] == [int(port)]


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='shellcheck is not installed')
def test_launch_scripts_pass_shellcheck() -> None:
    scripts = [str(p) for p in (ROOT / 'launch').iterdir() if p.suffix in ('.sh', '.sbatch')]
    assert len(scripts) == 4
    scripts.append(str(ROOT / 'benchmarks' / 'gpu.sh'))
    subprocess.run(['shellcheck', *scripts], check=True)
