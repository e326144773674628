"""Tests of data/remote_listing.py and of its use by several processes."""

import json
import os
import pathlib
import sys
import types
from collections.abc import Iterator

import jax
import pytest

from simsiam_jax import config, errors
from simsiam_jax.data import listing
from simsiam_jax.data.sources import open_source
from simsiam_jax.runtime import distributed
from simsiam_jax.tasks import inputs

NAMES = (
    'set/a/0.png',
    'set/a/.x/1.png',
    'set/@eaDir/2.png',
    'set/b/3.png',
    'set/b/',
    'set/b/n.txt',
)


class Blobs:
    """A page of two objects, as the client of Google Cloud Storage returns it."""

    def __init__(self, names: list[str], token: str | None):
        first = int(token or 0)
        page = [types.SimpleNamespace(name=name) for name in names[first : first + 2]]
        self.pages: Iterator = iter([page])
        self.next_page_token = str(first + 2) if first + 2 < len(names) else None


class Bucket:
    """Lists objects in pages; raises `failures` first. `requests` counts the pages."""

    def __init__(self) -> None:
        self.names, self.failures, self.requests = list(NAMES), [], 0

    def list_blobs(self, bucket: str, *, prefix: str, page_token: str | None, **options) -> Blobs:
        assert (bucket, options['retry']) == ('bucket', None)
        self.requests += 1
        if self.failures:
            raise self.failures.pop()
        return Blobs([name for name in self.names if name.startswith(prefix)], page_token)


@pytest.fixture
def bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    bucket = Bucket()
    module = types.SimpleNamespace(Client=lambda project: bucket)
    monkeypatch.setitem(sys.modules, 'google.cloud.storage', module)
    monkeypatch.setattr('google.cloud.storage', module, raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return bucket


def test_bucket_is_listed_in_pages_without_hidden_folders(bucket, capsys) -> None:
    source = open_source('folder:gs://bucket/set')
    assert source.names() == ['a/0.png', 'b/3.png']
    assert source.classes == ('a', 'b')
    assert bucket.requests == 3
    assert 'skipped hidden or of the system: .x (1), @eaDir (1)' in capsys.readouterr().err
    assert len(open_source('folder:gs://bucket/set/b/')) == 1
    with pytest.raises(errors.UserError, match='gs://bucket/sets contains no images'):
        open_source('folder:gs://bucket/sets')


def test_large_listing_is_used_again_for_a_day(bucket, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(listing, 'LARGE', 2)
    first = open_source('folder:gs://bucket/set')
    bucket.names.append('set/c/4.png')
    assert open_source('folder:gs://bucket/set').identity == first.identity
    assert bucket.requests == 3
    (cache,) = (tmp_path / 'simsiam_jax' / 'listings').iterdir()
    assert f'ago, 2 images; remove {cache} to list it again' in capsys.readouterr().out
    yesterday = cache.stat().st_mtime - 25 * 3600
    os.utime(cache, (yesterday, yesterday))
    assert len(open_source('folder:gs://bucket/set')) == 3
    cache.unlink()
    assert len(open_source('folder:gs://bucket/set')) == 3


def test_listing_waits_for_a_bucket_that_fails_for_a_moment(bucket, capsys) -> None:
    busy = OSError('busy')
    busy.code = 503
    bucket.failures = [busy, ConnectionError('reset')]
    assert len(open_source('folder:gs://bucket/set')) == 2
    assert bucket.requests == 5
    assert 'waiting up to 300 s for the image folder gs://bucket/set: reset' in (
        capsys.readouterr().err
    )
    data = config.default().data
    data.retry_seconds = 0
    bucket.failures = [ConnectionError('reset')]
    with pytest.raises(errors.TemporaryError, match='gs://bucket/set cannot be used for 0 s now'):
        inputs.open_source('folder:gs://bucket/set', data)


def test_listing_without_the_client_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'google.cloud.storage', None)
    monkeypatch.delattr('google.cloud.storage', raising=False)
    with pytest.raises(errors.UserError, match='pip install google-cloud-storage'):
        open_source('folder:gs://bucket/set')


def test_process_0_lists_for_the_others(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    def broadcast(value: object) -> object:
        if not jax.process_index():
            sent.append(json.dumps(value))
        return json.loads(sent[-1])

    monkeypatch.setattr(distributed, 'broadcast_from_process_0', broadcast)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(inputs, '_check_same_images', lambda *spec_and_source: None)
    data = config.default().data
    data.backend, data.range = 'host', 'dtype'
    found = []
    for process in range(2):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        found.append(inputs.open_source('folder:gs://bucket/set', data).identity)
    assert found == ['a/0.png\0b/3.png'] * 2
    assert bucket.requests == 3
    bucket.failures = [ConnectionError('reset')]
    data.retry_seconds = 0
    for process in range(2):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        with pytest.raises(errors.TemporaryError, match=r'cannot be used for \d+ s now'):
            inputs.open_source('folder:gs://bucket/set', data)
