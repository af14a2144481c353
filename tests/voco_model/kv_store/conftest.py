"""A real Redis server on loopback, and fake servers that misbehave."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

SERVER = shutil.which("redis-server")
# Timeout for a healthy server on a busy machine; no test waits for it to expire.
PATIENT = 20.0


class RedisServer:
    """A private ``redis-server`` in its own folder, on a Unix socket and a loopback port.

    Attributes:
        url: of the loopback port, which it keeps across restarts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.socket = folder / "redis.sock"
        self._process: subprocess.Popen | None = None

    def start(self, *options: str) -> None:
        """Starts the server and waits until it answers. Without persistence, unless ``options`` enable
        it."""
        command = [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--unixsocket", str(self.socket), "--dir", str(self.folder), *options]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + PATIENT
        while True:
            with suppress(OSError, redis_error()):
                if self.client().ping():
                    return
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.01)

    def kill(self) -> None:
        """Kills it without warning, as the kernel does when memory runs out."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()

    def stall(self) -> None:
        """Stops it: connections stay open and new ones are accepted, but nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self._process.pid}/stat")
        while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] not in "Tt":
            time.sleep(0.001)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def client(self):
        """redis-py's own client, for looking into the server and damaging its values."""
        import redis

        return redis.Redis.from_url(self.url, socket_timeout=PATIENT)

    def reset(self) -> None:
        """Resets it to running, empty and without limits."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        self.go_on()
        with self.client() as client:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
            client.flushall()


def redis_error() -> type[Exception]:
    import redis

    return redis.RedisError


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory):
    required = os.environ.get("VOCO_REQUIRE_REDIS") == "1"
    try:
        import redis  # noqa: F401
    except ImportError:
        if required:
            raise
        pytest.skip("needs redis-py: pip install -e '.[redis]'")
    if SERVER is None:
        message = "needs redis-server on the PATH (Debian: apt install redis-server)"
        pytest.fail(message) if required else pytest.skip(message)
    # A short path: that of a Unix socket is limited to 107 characters.
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(redis_process):
    """The session's Redis server, reset before each test."""
    redis_process.reset()
    return redis_process


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class FakeServer:
    """A TCP server on loopback that handles each connection by a function.

    Args:
        behave: called with each accepted socket, in a thread; it may read and write until ``OSError``.
    """

    def __init__(self, behave) -> None:
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.accepted: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            self._behave(connection)

    def close(self) -> None:
        for sock in (self._listener, *self.accepted):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def fake_server():
    """``fake_server(behave)`` starts a server, which is closed after the test."""
    servers: list[FakeServer] = []

    def start(behave) -> FakeServer:
        servers.append(FakeServer(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
