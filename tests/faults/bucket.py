"""Runs whose workdir is in a bucket, from the start to what reads them; prints what was seen.

PYTHONPATH=. python tests/faults/bucket.py [KILLS]

The bucket is that of fake_gcs.py, on this machine; google-cloud-storage and openssl must be there.
A run is refused a second one beside it, ended by SIGTERM, killed in the middle of saves, its newest
checkpoint damaged; its end must be that of an uninterrupted run on a disk, bit for bit. Where the
bucket or the credentials are missing one line must say so.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import fake_gcs
import kills
import numpy as np

import simsiam_jax
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.runtime import storage

WORKDIR = f'gs://{fake_gcs.BUCKET}/run'
LONG = ('--config.epochs=20', '--config.log.tensorboard=True')


class Trial:
    """A run in the storage, and how it is started, looked at and ended."""

    def __init__(self, bucket: fake_gcs.Bucket, logs: pathlib.Path):
        self.bucket, self.logs = bucket, logs

    def start(self, *flags: str, workdir: str = WORKDIR) -> subprocess.Popen:
        shutil.rmtree(self.logs, ignore_errors=True)
        return kills.start(workdir, 1, *LONG, *flags, logs=self.logs)[0]

    def end(self, process: subprocess.Popen, code: int, *texts: str) -> None:
        """Waits; the run must end with this code and have said these texts."""
        found, log = process.wait(timeout=kills.LIMIT), (self.logs / 'rank0.log').read_text()
        missing = [text for text in texts if text not in log]
        if found != code or missing or 'Traceback' in log:
            raise AssertionError(f'{found} for {code}, without {missing}: {log}')

    def text(self, name: str) -> str:
        return self.bucket.get(f'run/{name}')[1].decode()

    def steps(self) -> dict[str, bool]:
        """Those in the bucket, and whether they are whole."""
        found: dict[str, bool] = {}
        for name in self.bucket.names(f'run/{checkpoint_reader.FOLDER}/'):
            if step := name.split('/')[2]:
                found[step] = found.get(step, False) or name.endswith('/commit_success.txt')
        return found

    def await_steps(self, process: subprocess.Popen, count: int) -> None:
        """Until so many more are measured."""
        lines = self.text('metrics.jsonl').count('\n')
        while self.text('metrics.jsonl').count('\n') < lines + count:
            self.alive(process)

    def await_save(self, process: subprocess.Popen) -> str:
        """Until a checkpoint is there in half: its step."""
        before = self.steps()
        while True:
            self.alive(process)
            for step, whole in self.steps().items():
                if not whole and step not in before:
                    return step

    def alive(self, process: subprocess.Popen) -> None:
        time.sleep(0.001)
        if process.poll() is not None:
            raise AssertionError((self.logs / 'rank0.log').read_text())


def run(count: int, folder: pathlib.Path, bucket: fake_gcs.Bucket) -> None:
    trial = Trial(bucket, folder / 'logs')
    for where, mended in (
        (WORKDIR, 'credentials'),
        ('gs://none/run', 'check that the bucket exists'),
    ):
        os.environ['GOOGLE_AUTH_TOKEN_FOR_TESTING'] = 'wrong' if where == WORKDIR else 'a-token'
        trial.end(trial.start(workdir=where), 1, f'error: workdir {where} cannot be wr', mended)
    print('without credentials, without a bucket: one line, 1', flush=True)
    process = trial.start()
    trial.await_steps(process, 3)
    other = Trial(bucket, folder / 'other')
    other.end(other.start(), 1, f'another run is active in {WORKDIR}')
    process.send_signal(signal.SIGTERM)
    trial.end(process, 143)
    print(f'a second run refused; SIGTERM: 143, steps {trial.steps()}', flush=True)
    for _ in range(count):
        process = trial.start()
        step = trial.await_save(process)
        process.kill()
        process.wait()
        print(f'killed in the save of {step}: {trial.steps()}', flush=True)
    newest = max((step for step, whole in trial.steps().items() if whole), key=int)
    arrays = bucket.names(f'run/{checkpoint_reader.FOLDER}/{newest}/state/')
    largest = max(arrays, key=lambda name: len(bucket.get(name)[1]))
    bucket.put(largest, bytes(len(bucket.get(largest)[1])))
    trial.end(trial.start(), 0, f'warning: step {newest}')
    aside = len(bucket.names(f'run/damaged/{newest}/'))
    if not aside:
        raise AssertionError('the damaged step did not go aside')
    print(f'step {newest} damaged: {aside} objects aside; steps {trial.steps()}', flush=True)
    same(folder)
    lines = [json.loads(line)['step'] for line in trial.text('metrics.jsonl').splitlines()]
    starts = trial.text('starts.jsonl').count('\n')
    print(f'metrics to step {lines[-1]}, {starts} starts, the end that of the disk, bit for bit')
    left = {name.split('/')[1] for name in bucket.names('run/')}
    print(f'in the workdir: {", ".join(sorted(left - {""}))}')


def same(folder: pathlib.Path) -> None:
    """The end is that of an uninterrupted run on a disk."""
    if kills.end(kills.start(folder / 'whole', 1, *LONG)) != [0]:
        raise AssertionError((folder / 'whole' / 'rank0.log').read_text())
    if names := kills.differing(folder / 'whole', WORKDIR):
        raise AssertionError(f'the end differs from that of the run on a disk in {names}')


def read(folder: pathlib.Path) -> None:
    """What begins from the run, or looks at it."""
    module, variables = simsiam_jax.load_encoder(WORKDIR)
    features = module.apply(variables, np.zeros((2, 8, 8, 1), np.float32))
    print(f'load_encoder: features {features.shape}')
    commands = (
        (
            'main',
            *kills.FLAGS,
            '--config.epochs=1',
            f'--config.init_from={WORKDIR}',
            f'--workdir={folder}/next',
        ),
        ('tools.report', WORKDIR, f'--out={folder}/report.html'),
        ('tools.embed', f'--checkpoint={WORKDIR}', '--images=digits/test', f'--out={folder}/x.npz'),
        (
            'main',
            '--config=configs/knn.py',
            f'--config.init_from={WORKDIR}',
            f'--workdir={WORKDIR}',
        ),
    )
    for module, *flags in commands:
        subprocess.run([sys.executable, '-m', f'simsiam_jax.{module}', *flags], check=True)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        with fake_gcs.serve(folder) as (bucket, variables):
            os.environ.update(variables)
            storage.require_client(storage.folder(WORKDIR))
            run(int(sys.argv[1]) if len(sys.argv) > 1 else 3, folder, bucket)
            read(folder)
