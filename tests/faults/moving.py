"""Moves the images and the workdir of a run before each start; prints the counts.

PYTHONPATH=.:tests python tests/faults/moving.py 6

The final state must equal the state of an undisturbed run, bit for bit. Then an image is added,
removed or renamed, and the run must be refused with the name of an image that changed.
"""

import pathlib
import shutil
import signal
import sys
import tempfile

import kills
import outages

CHANGES = {
    'added': lambda image: shutil.copy(image, image.with_name('new.png')),
    'removed': lambda image: image.unlink(),
    'renamed': lambda image: image.rename(image.with_name('new.png')),
}


def run(moves: int, folder: pathlib.Path) -> None:
    """Stops and moves a run this often; raises if it ends differently."""
    place = folder / 'place0'
    outages.write_images(place / 'images')

    def start(workdir: str) -> kills.subprocess.Popen:
        flags = (f'--config.data.source=folder:{place}/images', '--config.epochs=20')
        return kills.start(place / workdir, 1, *flags)[0]

    if kills.end([start('whole')]) != [0]:
        raise AssertionError((place / 'whole/process0.log').read_text())
    whole = (place / 'whole').rename(folder / 'whole')
    for move in range(moves):
        process = start('run')
        kills.await_moment('step', place / 'run', [process])
        process.send_signal(signal.SIGTERM)
        if kills.end([process]) != [143]:
            raise AssertionError((place / 'run/process0.log').read_text())
        place = place.rename(folder / f'place{move + 1}')
    for what, change in CHANGES.items():
        kept = shutil.copytree(place / 'images', folder / 'kept')
        change(place / 'images/3/003.png')
        if kills.end([start('run')]) != [1]:
            raise AssertionError(f'an image was {what}, and the run was not refused')
        *_, message = (place / 'run/process0.log').read_text().splitlines()
        print(f'{what}: {message}', flush=True)
        if 'new.png' not in message and '003.png' not in message:
            raise AssertionError('the message names no image that changed')
        shutil.rmtree(place / 'images')
        kept.rename(place / 'images')
    if kills.end([start('run')]) != [0] or (names := kills.differing(whole, place / 'run')):
        raise AssertionError(f'{names or "the run failed"}')
    print(f'{moves} moves, the same final state; {len(CHANGES)} changes refused')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        run(int(sys.argv[1]) if len(sys.argv) > 1 else 6, pathlib.Path(scratch))
