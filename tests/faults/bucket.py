"""Tests runs whose workdir is in a bucket, and the tools that read them; prints the outcomes.

PYTHONPATH=. python tests/faults/bucket.py [KILLS]

fake_gcs.py serves the bucket on this machine; needs google-cloud-storage and openssl. The run must
refuse a second run in its workdir. It is then stopped by SIGTERM, killed KILLS times during a save,
and its newest checkpoint is damaged. Its final state must equal the state of an uninterrupted run
on a disk, bit for bit. Without bucket or credentials, it must exit with a one-line error.
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
    """Starts, inspects and stops a run in the bucket."""

    def __init__(self, bucket: fake_gcs.Bucket, logs: pathlib.Path):
        self.bucket, self.logs = bucket, logs

    def start(self, *flags: str, workdir: str = WORKDIR) -> subprocess.Popen:
        shutil.rmtree(self.logs, ignore_errors=True)
        return kills.start(workdir, 1, *LONG, *flags, logs=self.logs)[0]

    def end(self, process: subprocess.Popen, code: int, *texts: str) -> None:
        """Waits for the run, which must exit with this code and must have printed these texts."""
        status, log = process.wait(timeout=kills.LIMIT), (self.logs / 'process0.log').read_text()
        missing = [text for text in texts if text not in log]
        if status != code or missing or 'Traceback' in log:
            raise AssertionError(f'exit code {status}, expected {code}; without {missing}: {log}')

    def text(self, name: str) -> str:
        return self.bucket.get(f'run/{name}')[1].decode()

    def steps(self) -> dict[str, bool]:
        """Returns the steps in the bucket, and whether they are complete."""
        steps: dict[str, bool] = {}
        for name in self.bucket.names(f'run/{checkpoint_reader.FOLDER}/'):
            if step := name.split('/')[2]:
                steps[step] = steps.get(step, False) or name.endswith('/commit_success.txt')
        return steps

    def await_steps(self, process: subprocess.Popen, count: int) -> None:
        """Waits until `count` more steps are in metrics.jsonl."""
        lines = self.text('metrics.jsonl').count('\n')
        while self.text('metrics.jsonl').count('\n') < lines + count:
            self.check_alive(process)

    def await_save(self, process: subprocess.Popen) -> str:
        """Waits for an incomplete checkpoint and returns its step."""
        before = self.steps()
        while True:
            self.check_alive(process)
            for step, complete in self.steps().items():
                if not complete and step not in before:
                    return step

    def check_alive(self, process: subprocess.Popen) -> None:
        time.sleep(0.001)
        if process.poll() is not None:
            raise AssertionError((self.logs / 'process0.log').read_text())


def run(count: int, folder: pathlib.Path, bucket: fake_gcs.Bucket) -> None:
    trial = Trial(bucket, folder / 'logs')
    for workdir, hint in ((WORKDIR, 'credentials'), ('gs://none/run', 'that the bucket exists')):
        os.environ['GOOGLE_AUTH_TOKEN_FOR_TESTING'] = 'wrong' if workdir == WORKDIR else 'a-token'
        trial.end(trial.start(workdir=workdir), 1, f'error: workdir {workdir} cannot be wr', hint)
    print('without credentials or without a bucket: one-line error, exit code 1', flush=True)
    process = trial.start()
    trial.await_steps(process, 3)
    other = Trial(bucket, folder / 'other')
    other.end(other.start(), 1, f'another run is active in {WORKDIR}')
    process.send_signal(signal.SIGTERM)
    trial.end(process, 143)
    print(f'second run refused; SIGTERM: exit code 143, steps {trial.steps()}', flush=True)
    for _ in range(count):
        process = trial.start()
        step = trial.await_save(process)
        process.kill()
        process.wait()
        print(f'killed while saving step {step}: {trial.steps()}', flush=True)
    newest = max((step for step, complete in trial.steps().items() if complete), key=int)
    arrays = bucket.names(f'run/{checkpoint_reader.FOLDER}/{newest}/state/')
    largest = max(arrays, key=lambda name: len(bucket.get(name)[1]))
    bucket.put(largest, bytes(len(bucket.get(largest)[1])))
    trial.end(trial.start(), 0, f'warning: step {newest}')
    aside = len(bucket.names(f'run/damaged/{newest}/'))
    if not aside:
        raise AssertionError('the damaged step was not moved aside')
    print(f'step {newest} damaged: {aside} objects moved aside; steps {trial.steps()}', flush=True)
    check_final_state(folder)
    lines = [json.loads(line)['step'] for line in trial.text('metrics.jsonl').splitlines()]
    starts = trial.text('starts.jsonl').count('\n')
    print(f'metrics to step {lines[-1]}, {starts} starts; final state equals the one on a disk')
    names = {name.split('/')[1] for name in bucket.names('run/')}
    print(f'in the workdir: {", ".join(sorted(names - {""}))}')


def check_final_state(folder: pathlib.Path) -> None:
    """Checks that the final state equals the state of an uninterrupted run on a disk."""
    if kills.end(kills.start(folder / 'whole', 1, *LONG)) != [0]:
        raise AssertionError((folder / 'whole' / 'process0.log').read_text())
    if names := kills.differing(folder / 'whole', WORKDIR):
        raise AssertionError(f'the final state differs from the run on a disk in {names}')


def read(folder: pathlib.Path) -> None:
    """Runs the commands that start from the run or read it."""
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
