"""Takes the bucket of a run away repeatedly, for moments; prints what the run waited for.

PYTHONPATH=. python tests/faults/bucket_outages.py [ROUNDS] [SECONDS]

fake_gcs.py serves the bucket on this machine; needs google-cloud-storage and openssl. Images and
workdir are in the bucket. In each of ROUNDS (5) runs, requests are answered with 503 or 429, or not
at all, for 0.5 to SECONDS (5) seconds: at a random moment of the start (listing and restoring), of
training (reading and logs) and of a save. The run is stopped and resumed between. Its final state
and metrics must equal those of an undisturbed run on a disk, bit for bit.
"""

import collections
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time

import bucket as bucket_lib
import fake_gcs
import kills
import outages

KINDS = ('start', 'step', 'save', 'start', 'save', 'step')
FLAGS = (
    '--config.data.backend=host',
    '--config.batch_size=16',
    '--config.epochs=12',
    '--config.eval.train=',
    '--config.eval.test=',
    '--config.checkpoint.every_epochs=1',
)


def upload(images: pathlib.Path, bucket: fake_gcs.Bucket) -> None:
    for path in images.rglob('*.png'):  # reading one of them takes three requests
        bucket.put(f'set/{path.relative_to(images)}', path.read_bytes())


class Trial(bucket_lib.Trial):
    """A run in the bucket that keeps one log.

    Attributes:
      lasted: Seconds from the start to the first logged step.
    """

    lasted = 0.0

    def start_run(self) -> None:
        source = f'--config.data.source=folder:gs://{fake_gcs.BUCKET}/set'
        (self.process,) = kills.start(bucket_lib.WORKDIR, 1, *FLAGS, source, logs=self.logs)

    def log(self) -> str:
        return (self.logs / 'process0.log').read_text()

    def reach(self, kind: str) -> None:
        """Waits for a random moment of this kind."""
        if kind == 'start':
            self.process.send_signal(signal.SIGTERM)
            if (code := self.process.wait(timeout=kills.LIMIT)) != 143:
                raise AssertionError(f'exit code {code} after SIGTERM: {self.log()}')
            self.start_run()
            time.sleep(random.uniform(0.2, 0.9) * self.lasted)
        elif kind == 'save':
            self.await_save(self.process)
        else:
            self.await_loss()
            time.sleep(random.uniform(0, 0.5))

    def await_loss(self) -> None:
        """Waits until the loss of another step is in metrics.jsonl."""
        before = len(losses(self.text('metrics.jsonl')))
        while len(losses(self.text('metrics.jsonl'))) == before:
            self.check_alive(self.process)

    def take_away(self, longest: float) -> str:
        status, seconds = random.choice(['503', '429', 'hang']), random.uniform(0.5, longest)
        self.check_alive(self.process)
        self.bucket.away.write_text(status)
        time.sleep(seconds)
        self.bucket.away.unlink()
        return f'{status} for {seconds:.1f} s'


def run(rounds: int, longest: float, folder: pathlib.Path, bucket: fake_gcs.Bucket) -> None:
    outages.write_images(folder / 'images', 100)
    upload(folder / 'images', bucket)
    source = f'--config.data.source=folder:{folder}/images'
    if kills.end(kills.start(folder / 'whole', 1, *FLAGS, source)) != [0]:
        raise AssertionError((folder / 'whole' / 'process0.log').read_text())
    expected = losses((folder / 'whole' / 'metrics.jsonl').read_text())
    counts: collections.Counter[str] = collections.Counter()
    waits: collections.Counter[str] = collections.Counter()
    for number in range(rounds):
        for name in bucket.names('run/'):
            bucket.delete(name)
        trial = Trial(bucket, folder / f'logs{number}')
        begin = time.monotonic()
        trial.start_run()
        trial.await_loss()
        trial.lasted = time.monotonic() - begin
        for kind in KINDS:
            trial.reach(kind)
            text = trial.take_away(longest)
            counts[f'{kind}, {text.split()[0]}'] += 1
            print(f'run {number + 1}: {kind}, {text}', flush=True)
        trial.end(trial.process, 0)
        if 'damaged' in trial.log() or 'unreadable' in trial.log():
            raise AssertionError(trial.log())
        if names := kills.differing(folder / 'whole', bucket_lib.WORKDIR):
            raise AssertionError(f'the final state differs in {names}: {trial.log()}')
        if losses(trial.text('metrics.jsonl')) != expected:
            raise AssertionError(f'metrics.jsonl differs: {trial.log()}')
        waits.update(re.findall(r'waiting up to \d+ s for the ([a-z]+ ?[a-z]*)', trial.log()))
    total = counts.total()
    print(f'{total} outages in {rounds} runs, same final state and metrics: {dict(counts)}')
    print(f'the runs waited for: {dict(waits)}')


def losses(metrics: str) -> list[tuple[str, str]]:
    return re.findall(r'"step": (\d+),.*"train/loss": ([^,}]*)', metrics)


if __name__ == '__main__':
    rounds, longest = (float(x) for x in [*sys.argv[1:], *('5', '5')[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        with fake_gcs.serve(place) as (served, variables):
            os.environ.update(variables)
            run(int(rounds), longest, place, served)
