"""Tests of start-up and memory with many images: benchmarks/imagenet_scale.py."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.long
def test_many_images_fit_into_memory(tmp_path: pathlib.Path) -> None:
    script = ROOT / 'benchmarks' / 'imagenet_scale.py'
    done = subprocess.run(
        [sys.executable, str(script), '--count=20000', f'--folder={tmp_path}'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.strip('|').split('|') for line in done.stdout.splitlines()[2:]]
    peaks = {what.strip(): float(peak.removesuffix(' GiB ')) for what, _, peak in rows}
    assert len(peaks) == 8
    assert all(
        peak < 0.5 for what, peak in peaks.items() if what.startswith(('TFRecord', 'RankMe'))
    )
    assert max(peaks.values()) < 2.5  # with eight devices and batches on the way to them
    assert not list(tmp_path.iterdir())
