"""A real store: S3's protocol, spoken by a server in a process of its own.

Between us and the server sits a relay that counts the requests and, on demand, answers in its place.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from commands import user_error
from data_fixtures import shards_of
from loader_fixtures import assert_same, plan_of
from training_runs import records, train_here

from paradiffusion.data import remote as remote_module
from paradiffusion.data.index import SampleIndex, build_indexes, load_index
from paradiffusion.data.loader import LoaderSettings, make_loader
from paradiffusion.data.remote import RemoteError, RemotePath, Storage, cached_copy, list_remote, read_range, read_whole, with_state
from paradiffusion.data.shards import expand_shards
from paradiffusion.errors import UserError
from scripts.index_shards import main as index_shards

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (requirements-dev.txt)")
pytest.importorskip("moto.server", reason="moto[server] is not installed (requirements-dev.txt)")

FEW = Storage(retries=2)
SHARDS = "s3://bucket/web/{000000..000003}.tar"
SETTINGS = LoaderSettings(seed=1, workers=0, last_step=12)


class Relay(ThreadingHTTPServer):
    """Passes requests on to port ``to``. ``answer`` may give (status, code of S3) instead; ``cut`` halves one answer."""

    daemon_threads = True

    def __init__(self, to: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.to = to
        self.lines: list[str] = []
        self.restore()

    def restore(self) -> None:
        self.answer: Callable[[str], tuple[int, str] | None] = lambda line: None
        self.cut = 0
        self.lines.clear()

    def gets(self) -> list[str]:
        return [line for line in self.lines if line.startswith("GET /bucket/web/") and "index" not in line]


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Relay

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {self.path} {self.headers.get('Range', '')}"
        self.server.lines.append(line)
        if instead := self.server.answer(line):
            text = f"<Error><Code>{instead[1]}</Code><Message>no</Message></Error>".encode()
            return self._answer(instead[0], [("Content-Type", "application/xml")], text, len(text))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.to, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        data = response.read()
        upstream.close()
        whole = int(response.getheader("Content-Length") or len(data))
        if self.server.cut and self.command == "GET":
            self.server.cut -= 1
            data, self.close_connection = data[: len(data) // 2], True
        dropped = ("content-length", "transfer-encoding", "connection", "date", "server")
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
        self._answer(response.status, kept, data, whole)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, size: int) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(size))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    found = next((int(port[1]) for line in server.stdout if (port := re.search(r"127\.0\.0\.1:(\d+)", line))), None)
    threading.Thread(target=server.stdout.read, daemon=True).start()  # Else its log would fill the pipe, and it wait.
    assert found, "moto did not start"
    yield found
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return shards_of(tmp_path_factory.mktemp("shards"), 70)


@pytest.fixture(scope="module")
def relay(server_port: int, local: SampleIndex) -> Iterator[Relay]:
    """The way to a bucket that has the shards of ``local`` in ``web/``, without their indexes."""
    relay = Relay(server_port)
    threading.Thread(target=relay.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, f"http://127.0.0.1:{relay.server_address[1]}")
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        for shard in local.shards:
            system.pipe_file(f"bucket/web/{shard.name}", Path(str(shard)).read_bytes())
        yield relay
    relay.shutdown()
    relay.server_close()


def set_environment(patch: pytest.MonkeyPatch, url: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    ours = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "EC2_METADATA_DISABLED": "true",
            "CONFIG_FILE": os.devnull, "SHARED_CREDENTIALS_FILE": os.devnull}  # fmt: skip
    for name, value in ours.items():
        patch.setenv(f"AWS_{name}", value)


def connect_anew() -> None:
    remote_module._connect.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def fresh(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("paradiffusion.data.remote._FIRST_WAIT", 0.001)
    relay.restore()
    connect_anew()
    yield
    connect_anew()


@pytest.fixture(scope="module")
def indexes(relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexes")
    connect_anew()
    assert not [one for one in build_indexes(expand_shards(SHARDS), folder=folder) if isinstance(one, UserError)]
    return folder


def remote(indexes: Path, **access: Any) -> SampleIndex:
    return load_index(expand_shards(SHARDS, storage=replace(FEW, index_dir=str(indexes), **access)))


def test_the_same_batches_as_from_disk(local: SampleIndex, indexes: Path, relay: Relay) -> None:
    """In forked workers, after this process has been connected; one request a sample, one HEAD a shard."""
    index = remote(indexes)
    assert index.fingerprint() == local.fingerprint()
    assert [line.split()[0] for line in relay.lines] == ["HEAD"] * 4
    loader = make_loader(index, plan_of(index), replace(SETTINGS, workers=2))
    assert_same(list(make_loader(local, plan_of(local), SETTINGS)), list(loader))
    assert not loader.report.bad
    assert len(relay.gets()) == 12 * 8 and all("bytes=" in line for line in relay.gets())
    assert len(relay.lines) == 12 * 8 + 4


def test_folders_and_patterns(relay: Relay) -> None:
    names = [f"s3://bucket/web/00000{number}.tar" for number in range(4)]
    assert [str(path) for path in list_remote("s3://bucket/web/", FEW)] == names
    assert [str(path) for path in list_remote("s3://bucket/web/00000[12].tar", FEW)] == names[1:3]
    for nothing in ("s3://bucket/nothing/", "s3://nowhere/"):
        user_error(r"matches no .tar file", expand_shards, nothing)


def test_the_store_goes_away_in_the_middle(local: SampleIndex, indexes: Path, relay: Relay) -> None:
    """For a moment, which is passed over; then for good."""
    index = remote(indexes, retries=6)
    relay.answer = lambda line: (503, "SlowDown") if len(relay.lines) % 3 == 0 else None
    relay.cut = 5  # Answers that end in the middle.
    loader = make_loader(index, plan_of(index), SETTINGS)
    assert_same(list(make_loader(local, plan_of(local), SETTINGS)), list(loader))
    assert not loader.report.bad and relay.cut == 0 and len(relay.gets()) > 12 * 8 * 1.3
    relay.restore()
    loader = make_loader(remote(indexes), plan_of(index), replace(SETTINGS, workers=1, last_step=None))
    next(loader)
    relay.answer = lambda line: (503, "ServiceUnavailable")
    said = r"samples could not be read .*answers 503 \(ServiceUnavailable\), after 3 tries"
    with pytest.raises(UserError, match=said):
        for _ in loader:
            pass


def test_index_and_train(relay: Relay, tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user does it, with the credentials in the environment."""
    monkeypatch.setattr(signal, "signal", lambda *both: None)
    assert index_shards([f"shards={SHARDS}", f"output={tmp_path / 'indexes'}", "processes=2"]) == 0
    kept = [one for one in tiny_arguments if not one.startswith(("data.shards", "data.val_shards", "data.demo"))]
    kept += ["stage=1", f"data.shards={SHARDS}", "max_steps=2", "data.workers=2", "validate_every=1000", "log_every=1"]
    for name, more in (("ranges", []), ("streamed", ["data.streaming=true"])):
        assert train_here([*kept, *more, f"data.index_dir={tmp_path / 'indexes'}", f"run_dir={tmp_path / name}"]) == 0
        assert len(records(tmp_path / name / "stage1")) == 2


def test_what_is_not_there(relay: Relay) -> None:
    for url, said in (("s3://bucket/web/x.tar", "it is not there"), ("s3://nowhere/x.tar", "no such bucket")):
        for read in (lambda path: read_range(path, 0, 10), read_whole):
            relay.lines.clear()
            with pytest.raises(RemoteError, match=said):
                read(RemotePath(url, FEW))
            assert len(relay.lines) == 1
        user_error(rf"The shard {url} cannot be read: .*{said}", load_index, expand_shards(url, storage=FEW))


@pytest.mark.parametrize(
    ("status", "code", "tries", "said"),
    [
        (403, "AccessDenied", 1, r"access is denied \(AccessDenied\)"), (400, "ExpiredToken", 1, r"access is denied \(ExpiredToken\)"),
        (400, "InvalidRequest", 1, r"answers 400 \(InvalidRequest\): check"),
        (503, "SlowDown", 3, r"answers 503 \(SlowDown\), after 3 tries"),
        (400, "RequestTimeout", 3, r"answers 400 \(RequestTimeout\), after 3 tries"),
    ],
)  # fmt: skip
def test_what_the_store_refuses(relay: Relay, status: int, code: str, tries: int, said: str) -> None:
    """The libraries' own tries are not multiplied with ours: a throttled store is asked three times, not 75."""
    relay.answer = lambda line: (status, code)
    with pytest.raises(RemoteError, match=said):
        read_range(RemotePath("s3://bucket/web/000000.tar", FEW), 0, 10)
    assert len(relay.lines) == tries
    with pytest.raises(RemoteError, match="denied" if status == 403 else f"answers {status}|denied"):
        with_state(RemotePath("s3://bucket/web/000000.tar", FEW))
    user_error(r"^s3://bucket/web/\*.tar cannot be listed \(.*\): name the shards", list_remote, "s3://bucket/web/*.tar", FEW)


def test_without_credentials(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    shard = RemotePath("s3://bucket/web/000000.tar", FEW)
    with pytest.raises(RemoteError, match=r"^no credentials are found .*FSSPEC_S3_ANON=true\)$"):
        read_range(shard, 0, 10)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    connect_anew()
    with pytest.raises(RemoteError, match=r"^ProfileNotFound .*nobody\S* could not be found$"):
        read_range(shard, 0, 10)
    assert not relay.lines


def test_the_users_own_settings_are_kept(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"anon": True, "config_kwargs": {"max_pool_connections": 3}}
    monkeypatch.setitem(fsspec.config.conf, "s3", own)
    system = remote_module.system_of("s3://bucket/x")
    assert system.anon and system.config_kwargs["max_pool_connections"] == 3
    assert system.config_kwargs["retries"] == {"total_max_attempts": 1}


def test_a_shard_that_goes_or_changes_after_indexing(indexes: Path, relay: Relay, tmp_path: Path) -> None:
    """Its samples are counted as bad with the reason; those of another of the same size are not taken for its own."""
    index = remote(indexes)
    shard = with_state(RemotePath("s3://bucket/web/000002.tar", replace(FEW, cache_dir=str(tmp_path), cache_bytes=1 << 30)))
    system = s3fs.S3FileSystem()
    whole = system.cat_file(shard.url)
    try:
        for data, said in ((None, "it is not there"), (whole[::-1], "it was replaced since it was indexed")):
            system.rm_file(shard.url) if data is None else system.pipe_file(shard.url, data)
            unread = rf"samples could not be read .*000002.tar/\d+: {said}.*max_bad_fraction"
            with pytest.raises(UserError, match=unread):
                list(make_loader(index, plan_of(index), SETTINGS))
            with pytest.raises(RemoteError, match=said):
                cached_copy(shard)
        user_error(r"1 of the 4 remote shards .*000002.tar", remote, indexes)  # A new start looks at the versions.
    finally:
        system.pipe_file(shard.url, whole)
    assert not list(tmp_path.glob("*.shard"))
