"""A fake Google Cloud Storage with one bucket, in a process of its own on this machine.

TensorFlow always connects to https://storage.googleapis.com, so it uses the server as a proxy and
trusts the certificate that is created here. TensorStore and Google's own client can be given the
server's address.
"""

import ast
import contextlib
import http.server
import json
import os
import pathlib
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

BUCKET, TOKEN = 'bucket', 'a-token'
HOSTS = ('www.googleapis.com', 'storage.googleapis.com')


class Bucket:
    """The objects and the token; each object is a file with 8 bytes of generation, then content.

    Other processes than the server may read and write too, while no client does.

    Attributes:
      token: File of the token that clients must send.
      page: File of the largest number of objects in an answer.
      away: If this file exists, every request is answered with its text, a status such as 503; if
        the text is 'hang', requests wait until the file is removed.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder, self.token = folder / 'objects', folder / 'token'
        self.page, self.away, self._counts = folder / 'page', folder / 'away', folder / 'counts'

    def counts(self) -> dict[str, int]:
        """Returns the requests so far: their number, those of lists, and the bytes in them."""
        return json.loads(self._counts.read_text())

    def count(self, counts: dict[str, int]) -> None:
        partial = self._folder.parent / 'partial'
        partial.write_text(json.dumps(counts))
        partial.replace(self._counts)

    def names(self, prefix: str = '') -> list[str]:
        names = (urllib.parse.unquote(name) for name in os.listdir(self._folder))
        return sorted(name for name in names if name.startswith(prefix))

    def get(self, name: str) -> tuple[int, bytes]:
        """Returns generation and content, or 0 and nothing if there is no such object."""
        try:
            data = self._path(name).read_bytes()
        except FileNotFoundError:
            return 0, b''
        return int.from_bytes(data[:8]), data[8:]

    def put(self, name: str, content: bytes) -> None:
        partial = self._folder.parent / 'partial'
        partial.write_bytes(time.time_ns().to_bytes(8) + content)
        partial.replace(self._path(name))

    def delete(self, name: str) -> None:
        self._path(name).unlink()

    def _path(self, name: str) -> pathlib.Path:
        return self._folder / urllib.parse.quote(name, safe='')


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: pathlib.Path):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.bucket, self.guard = Bucket(folder), threading.RLock()
        self.uploads: dict[str, bytearray] = {}
        self.counts = {'requests': 0, 'lists': 0, 'bytes': 0}
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / 'certificate.pem', folder / 'key.pem')

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores connections that break because a client was killed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ''


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # otherwise each response waits 40 ms
    server: _Server

    def do_CONNECT(self) -> None:
        self._answer(200)
        self.request = self.server.context.wrap_socket(self.request, server_side=True)
        self.setup()  # the requests that follow are encrypted

    def finish(self) -> None:
        super().finish()
        self.request.close()

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query).items()}
        body, away = self._body(), self.server.bucket.away
        while (status := _text(away)) == 'hang':
            time.sleep(0.05)
        with self.server.guard:
            counts = self.server.counts
            counts['requests'] += 1
            counts['lists'] += self.command == 'GET' and url.path.endswith('/o')
            counts['bytes'] += len(body)
            self.server.bucket.count(counts)
            if status:
                self._answer(int(status))
                return
            # Google's own client sends no token to a custom address.
            named = 'X-Goog-API-Client' in self.headers
            token = f'Bearer {self.server.bucket.token.read_text()}'
            if not named and self.headers.get('Authorization') != token:
                self._answer(401)
                return
            path = re.fullmatch(
                r'/(?P<upload>upload/)?storage/v1/b/(?P<bucket>[^/]+)(/storageLayout|(?P<o>/o))?(/(?P<name>[^/]+)'
                r'(/rewriteTo/b/(?P<other>[^/]+)/o/(?P<to>[^/]+)|/(?P<compose>compose))?)?|/(?P<xml>[^/]+)/(?P<key>.+)',
                url.path,
            )
            parts = {k: urllib.parse.unquote(v or '') for k, v in path.groupdict().items()}
            if (parts['bucket'] or parts['xml']) != BUCKET:
                self._answer(404)
            elif parts['upload']:
                self._upload(query, body)
            elif parts['compose']:
                self._compose(parts['name'], body)
            elif name := parts['name'] or parts['key']:
                self._object(name, parts, query)
            elif parts['o']:
                self._json(self._list(query))
            else:
                self._json({'name': BUCKET, 'hierarchicalNamespace': {'enabled': False}})

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline() or '0', 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        if not self.rfile.readline():
            raise ConnectionError('the client is gone')
        return body

    def _object(self, name: str, parts: dict[str, str], query: dict[str, str]) -> None:
        bucket = self.server.bucket
        generation, content = bucket.get(name)
        if not self._check_generation(name, query):
            return
        if not generation:
            self._answer(404)
        elif parts['to']:
            bucket.put(parts['to'], content)
            self._json({'done': True, 'resource': self._describe(parts['to'])})
        elif self.command == 'DELETE':
            bucket.delete(name)
            self._answer(204)
        elif parts['key'] or query.get('alt') == 'media':
            wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
            first, last = (int(wanted[1]), int(wanted[2] or len(content))) if wanted else (0, -1)
            headers = {'x-goog-generation': str(generation)}
            if not wanted:
                self._answer(200, content, headers)
            elif first >= len(content):
                self._answer(416)
            else:
                part = content[first : last + 1]
                end = first + len(part) - 1
                headers['Content-Range'] = f'bytes {first}-{end}/{len(content)}'
                self._answer(206, part, headers)
        else:
            self._json(self._describe(name))

    def _compose(self, name: str, body: bytes) -> None:
        """Joins objects; TensorFlow's request is almost JSON."""
        content = b''
        for source in ast.literal_eval(body.decode())['sourceObjects']:
            generation, part = self.server.bucket.get(source['name'])
            expected = source.get('objectPrecondition', {}).get('ifGenerationMatch', generation)
            if not generation or int(expected) != generation:
                self._answer(412 if generation else 404)
                return
            content += part
        self._put(name, content)

    def _check_generation(self, name: str, query: dict[str, str]) -> bool:
        """Returns whether the object has the requested generation; otherwise sends the status."""
        generation = self.server.bucket.get(name)[0]
        if int(query.get('ifGenerationMatch', generation)) != generation:
            self._answer(412)
        elif generation and int(query.get('ifGenerationNotMatch', -1)) == generation:
            self._answer(304)
        else:
            return True
        return False

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        name, uploads = query['name'], self.server.uploads
        if not self._check_generation(name, query):
            return
        if query['uploadType'] == 'media':
            self._put(name, body)
        elif self.command == 'POST':
            number = str(len(uploads))
            uploads[number] = bytearray()
            address = f'https://{HOSTS[0]}{self.path}&upload_id={number}'
            self._answer(200, headers={'Location': address})
        else:
            sent = uploads[query['upload_id']]
            sent += body
            total = self.headers.get('Content-Range', '').rpartition('/')[2]
            if total in ('', str(len(sent))):  # an empty file has no range
                self._put(name, bytes(sent))
            else:
                self._answer(308, headers={'Range': f'bytes=0-{len(sent) - 1}'} if sent else {})

    def _put(self, name: str, content: bytes) -> None:
        self.server.bucket.put(name, content)
        self._json(self._describe(name))

    def _describe(self, name: str) -> dict[str, str]:
        generation, content = self.server.bucket.get(name)
        described = {'name': name, 'bucket': BUCKET, 'updated': '2026-01-01T00:00:00.000Z'}
        return described | {'size': str(len(content)), 'generation': str(generation)}

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
        entries: dict[str, bool] = {}  # name -> whether it is a prefix of objects
        for name in self.server.bucket.names(prefix):
            if name < query.get('startOffset', ''):
                continue
            if 'endOffset' in query and name >= query['endOffset']:
                continue
            at = name.find(delimiter, len(prefix)) if delimiter else -1
            entries[name if at < 0 else name[: at + 1]] = at >= 0
        after = [name for name in entries if name > query.get('pageToken', '')]
        largest = int(self.server.bucket.page.read_text())
        page = after[: min(largest, int(query.get('maxResults', largest)))]
        listed = {
            'items': [self._describe(name) for name in page if not entries[name]],
            'prefixes': [name for name in page if entries[name]],
        }
        return listed | ({'nextPageToken': page[-1]} if page != after else {})

    def _json(self, value: dict[str, Any]) -> None:
        self._answer(200, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    def _answer(
        self, code: int, content: bytes = b'', headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if self.command != 'CONNECT' and code not in (204, 304):
            self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if code not in (204, 304):
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        return


@contextlib.contextmanager
def serve(folder: pathlib.Path) -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serves a bucket, within this context; needs openssl.

    Args:
      folder: Empty folder for objects, token and certificate.

    Yields:
      The bucket, and the environment variables by which a process finds it.
    """
    names = ','.join(f'DNS:{host}' for host in HOSTS)
    command = ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2']
    command += ['-keyout', 'key.pem', '-out', 'certificate.pem', '-subj', '/CN=loopback']
    command += ['-addext', f'subjectAltName={names}']
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / 'objects').mkdir()
    (folder / 'token').write_text(TOKEN)
    (folder / 'page').write_text('7')  # small pages expose clients that read only the first page
    # A thread of this process could not respond: TensorFlow sometimes waits and blocks all threads.
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        address = f'http://127.0.0.1:{server.stdout.readline().strip()}'
        try:
            yield (
                Bucket(folder),
                {
                    'HTTPS_PROXY': address,
                    'CURL_CA_BUNDLE': str(folder / 'certificate.pem'),
                    'TENSORSTORE_GCS_HTTP_URL': address,
                    'STORAGE_EMULATOR_HOST': address,
                    'GOOGLE_CLOUD_PROJECT': 'a-project',
                    'GOOGLE_AUTH_TOKEN_FOR_TESTING': TOKEN,
                },
            )
        finally:
            server.kill()


if __name__ == '__main__':
    with _Server(pathlib.Path(sys.argv[1])) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
