"""Where entries are loaded from: files in and out of the page cache, and a Redis server on loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from bench.harness.guard import NotMeasuredError

_START_SECONDS = 20.0


def write_back(paths: Iterable[Path]) -> None:
    """Wait until the files are on the disk: until then they can't be dropped from memory."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def drop(paths: Iterable[Path]) -> None:
    """Ask the system to forget the pages of files that were written back."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def check_dropped(paths: Iterable[Path]) -> None:
    """Drop the files' pages and see that they are gone.

    Raises:
        NotMeasuredError: they aren't, as on a file system in memory, or the system can't say.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        raise NotMeasuredError("this system doesn't say what is in its page cache")
    for path in paths:
        drop([path])
        size = path.stat().st_size
        fd = os.open(path, os.O_RDONLY)
        try:
            # A read that may not wait; it makes the kernel read ahead, so one look a file.
            os.preadv(fd, [bytearray(1)], size // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError as error:
            raise NotMeasuredError(
                f"the file system doesn't say what is cached: {error}"
            ) from error
        finally:
            os.close(fd)
        raise NotMeasuredError("files of this folder can't be dropped from memory")
    drop(paths)


def read_file(path: Path, into: memoryview) -> int:
    """Open a file, read its first bytes into existing memory, and close it; how many were read."""
    fd = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(into):
            count = os.preadv(fd, [into[done:]], done)
            if not count:
                break
            done += count
        return done
    finally:
        os.close(fd)


class RedisServer:
    """A ``redis-server`` of its own on a loopback port, without persistence.

    Attributes:
        url: for clients.
        version: of the server.

    Raises:
        NotMeasuredError: there is none, or no client for it, or it doesn't start.
    """

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise NotMeasuredError("redis-server is not on the PATH")
        try:
            import redis
        except ImportError:
            raise NotMeasuredError("redis-py is not installed") from None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}/0"
        command = [
            program,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            folder,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        finish = time.monotonic() + _START_SECONDS
        while True:
            try:
                with redis.Redis.from_url(self.url) as client:
                    self.version = client.info("server")["redis_version"]
                return
            except redis.ConnectionError as error:
                if self._process.poll() is not None or time.monotonic() > finish:
                    self.stop()
                    raise NotMeasuredError(f"redis-server did not start: {error}") from error
                time.sleep(0.02)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
