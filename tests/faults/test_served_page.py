"""The served page under uploads that are many, large, slow, malformed or hostile."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.faults, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
KEPT = ROOT / "tests" / "fixtures" / "checkpoints" / "0.1.0"
AT_ONCE = 200
HOSTILE = "<script>alert(1)</script>.png"


class Served:
    """A server of the kept Single in a process of its own."""

    def __init__(self, temporary: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        serve = ("serve", KEPT / "single.ckpt", "--size", "16", "--port", self.port)
        command = [sys.executable, "-m", "explainers", *map(str, serve)]
        environment = {"SIMADV_TRUST": "networks.Tiny", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [*command, "--accelerator", "cpu", "--megabytes", "1"],
            env={"PATH": "/usr/bin:/bin", "TMPDIR": str(temporary), **environment},
            cwd=temporary,
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(240):
            try:
                self.client.get("/")
                return
            except httpx.TransportError:
                time.sleep(0.5)
        raise TimeoutError

    def post(self, content: bytes, name: str) -> httpx.Response:
        """Ask for an explanation."""
        return self.client.post("/explain", params={"name": name}, content=content)

    def megabytes(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """The server, and whether it left anything."""
    server = Served(tmp_path)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)


def picture() -> bytes:
    """A PNG file."""
    buffer = BytesIO()
    Image.fromarray(np.eye(20, dtype=np.uint8) * 255).save(buffer, "PNG")
    return buffer.getvalue()


def test_it_outlives_uploads(
    served: Served, tmp_path: Path, tell_fault: Callable[[str, int, int], None]
) -> None:
    good = picture()
    assert served.post(good, "a.png").status_code == 200
    before = served.megabytes()
    slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
    for connection in slow:  # of a body that never ends
        connection.sendall(b"POST /explain?name=a.png HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        connection.sendall(b"Content-Length: 1000\r\n\r\nx")
    with ThreadPoolExecutor(32) as pool:
        codes = [
            r.status_code for r in pool.map(lambda _: served.post(good, "a.png"), range(AT_ONCE))
        ]
    for connection in slow:
        connection.close()
    answers = {
        413: [served.post(bytes(2 * 2**20), "large.png")],
        422: [
            served.post(good[:40], "cut.png"),
            served.post(b"", "empty.png"),
            served.post(b"<svg onload=alert(1)>", "a.svg"),
            served.post(b"nothing", "../../../../etc/cron.d/x"),
            served.post(b"nothing", HOSTILE),
        ],
    }
    told = [(code, answer) for code, group in answers.items() for answer in group]
    survived = codes.count(200) + sum(answer.status_code == code for code, answer in told)
    tell_fault("uploads to the served page", AT_ONCE + len(told), survived)
    assert survived == AT_ONCE + len(told)
    assert all(answer.headers["content-type"] == "application/json" for _, answer in told)
    assert "etc/cron.d" not in answers[422][3].text
    assert served.post(good, "a.png").status_code == 200
    grown = served.megabytes() - before
    print(f"memory of the server grew by {grown:.0f} MB")
    assert grown < 200
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # in its temporary folder
