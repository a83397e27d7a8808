"""A real Redis or Valkey for tests, on a free port, without persistence."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")


class RedisServer:
    """A server that can be stopped, and restarted empty on the same port."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        assert BINARY is not None
        self.folder = tempfile.TemporaryDirectory(prefix="redis-")
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.process = subprocess.Popen(
            [BINARY, *options, "--dir", self.folder.name], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline and self.process.poll() is None
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()
