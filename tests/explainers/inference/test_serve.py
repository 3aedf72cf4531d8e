"""The served page: what it answers, what it refuses, and that a browser can explore an upload."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from files import write_dicom, write_image
from markupsafe import Markup
from PIL import Image
from playwright.sync_api import Page, expect
from torch import Tensor

from explainers.__main__ import main, page_of
from explainers.inference import Answer, serve
from explainers.inference.explain import Model
from explainers.inference.serve import LOCAL, application


def bright(image: Tensor) -> Answer:
    """The image itself is the map; bright ones are ill."""
    share = image.mean((1, 2, 3))
    probability = torch.stack([1 - share, share], 1)
    return Answer(probability, probability.argmax(1), image, 1 - image, image.mean(1))


MODEL = Model(bright, 16, 1, ["<b>well</b>", "ill"])
LIMIT = 20_000


@pytest.fixture
def client() -> TestClient:
    return TestClient(page_of(MODEL, "a <model>", LIMIT, LOCAL), "http://localhost")


@pytest.fixture
def spot(tmp_path: Path) -> Path:
    """A picture of 32 x 64 pixels, its left quarter white."""
    pixels = np.zeros((32, 64), np.uint8)
    pixels[:, :16] = 255
    write_image(tmp_path / "spot.png", pixels)
    return tmp_path / "spot.png"


def ask(client: TestClient, path: Path, name: str = "", frame: str = "") -> httpx.Response:
    query = {"name": name or path.name, "frame": frame}
    return client.post("/explain", params=query, content=path.read_bytes())


def test_an_upload_is_explained_at_its_own_size(client: TestClient, spot: Path) -> None:
    answer = ask(client, spot).json()
    assert answer["facts"] == {
        "decision": "<b>well</b>",
        "p(<b>well</b>)": "0.750",
        "p(ill)": "0.250",
    }
    assert (answer["data"]["height"], answer["data"]["width"]) == (32, 64)
    heat = np.frombuffer(base64.b64decode(answer["data"]["maps"][0]), "<f4").reshape(32, 64)
    assert heat[:, :12].min() > 0.9
    assert heat[:, 20:].max() < 0.1
    write_image(spot.with_name("large.png"), np.zeros((20, 4000), np.uint8))
    data = ask(client, spot.with_name("large.png")).json()["data"]
    assert (data["height"], data["width"]) == (4, 768)


def test_dicom_and_frames(client: TestClient, tmp_path: Path) -> None:
    write_dicom(tmp_path / "film", np.full((16, 16), 200, np.uint8))
    assert ask(client, tmp_path / "film").json()["facts"]["decision"] == "ill"
    frames = [Image.new("L", (16, 16), value) for value in (0, 255)]
    frames[0].save(tmp_path / "pages.tiff", save_all=True, append_images=frames[1:])
    told = ask(client, tmp_path / "pages.tiff")
    reason = "it has 2 frames, give the one to read (0 to 1)"
    assert told.status_code == 422
    assert told.json() == {"error": f"Image pages.tiff cannot be read: {reason}."}
    assert ask(client, tmp_path / "pages.tiff", frame="1").json()["facts"]["decision"] == "ill"
    told = ask(client, tmp_path / "pages.tiff", frame="-1")
    assert told.json() == {"error": "frame must be a whole number, but got '-1'."}


@pytest.mark.parametrize("name", ["../../etc/passwd.png", "/tmp/x.png", "a\0.png", "x" * 300, ""])
def test_names_of_uploads_lead_nowhere(
    client: TestClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "text").write_text("no picture")
    told = client.post("/explain", params={"name": name}, content=b"no picture")
    assert told.status_code == 422
    assert "cannot be read" in told.json()["error"]
    assert str(tmp_path) not in told.json()["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_what_is_refused(client: TestClient, spot: Path) -> None:
    large = client.post("/explain", params={"name": "x.png"}, content=bytes(LIMIT + 1))
    assert large.status_code == 413
    assert large.json() == {"error": "the file has more than 0.0190735 MB, the limit."}
    elsewhere = {"host": "evil.example"}
    assert client.post("/explain", content=b"", headers=elsewhere).status_code == 400
    other_page = {"sec-fetch-site": "cross-site"}
    assert client.post("/explain", content=b"", headers=other_page).status_code == 403
    assert client.get("/docs").status_code == 404
    assert client.get("/../pyproject.toml").status_code == 404


def test_a_failing_model_is_told(spot: Path) -> None:
    def fails(image: Tensor) -> Answer:
        raise RuntimeError("out of memory")

    app = page_of(MODEL._replace(answer=fails), "", LIMIT, LOCAL)
    told = ask(TestClient(app, "http://localhost"), spot)
    assert told.status_code == 500
    assert told.json() == {"error": "the model failed: RuntimeError."}


def test_the_page_escapes_and_allows_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert "<title>a &lt;model&gt;</title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_slow_uploads_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PATIENCE", 0.1)
    app = application(lambda *_: {}, Markup(), "", LIMIT)

    async def dripping() -> Any:
        for _ in range(20):
            await asyncio.sleep(0.1)
            yield b"x"

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/explain", content=dripping())

    told = asyncio.run(asked())
    assert told.status_code == 408
    assert told.json() == {"error": "the upload took more than 0.1 s."}


def test_many_at_once_are_explained_one_by_one(spot: Path) -> None:
    running: list[int] = []
    most: list[int] = []

    def explain(path: Path, frame: int | None) -> dict[str, Any]:
        running.append(1)
        most.append(len(running))
        time.sleep(0.002)
        running.pop()
        return {"size": path.stat().st_size}

    app = application(explain, Markup(), "", LIMIT)

    async def asked() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            posts = [client.post("/explain", content=spot.read_bytes()) for _ in range(200)]
            return await asyncio.gather(*posts)

    found = asyncio.run(asked())
    assert {response.status_code for response in found} == {200}
    assert {response.json()["size"] for response in found} == {spot.stat().st_size}
    assert max(most) == 1


@pytest.fixture
def address() -> Iterator[Callable[[Any], str]]:
    """Starts an application on a free port of this machine."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def started(app: Any) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{port}"

    yield started
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def test_a_browser_explores_an_upload(
    browser: Page, address: Callable[[Any], str], spot: Path
) -> None:
    browser.goto(address(page_of(MODEL, "a model", LIMIT, LOCAL)))
    browser.set_input_files("#file", spot)
    facts = re.compile(r"spot.png · decision: <b>well</b> · p\(<b>well</b>\): 0.750")
    expect(browser.locator("#x-facts")).to_have_text(facts)
    browser.locator("#x-threshold").fill("50")
    browser.select_option("#x-scale", "own")
    share = float(browser.locator("#explorer figure > output").inner_text().rsplit(" ", 1)[1])
    assert share == pytest.approx(0.25, abs=0.02)  # the white quarter, its border blurred


def test_a_browser_tells_of_a_file_that_cannot_be_read(
    browser: Page, address: Callable[[Any], str], tmp_path: Path, spot: Path
) -> None:
    (tmp_path / "<img src=x>.png").write_text("no picture")
    browser.goto(address(page_of(MODEL, "a model", LIMIT, LOCAL)))
    browser.set_input_files("#file", tmp_path / "<img src=x>.png")
    reason = re.compile("Image <img src=x>.png cannot be read")
    expect(browser.locator("#told")).to_have_text(reason)
    browser.set_input_files("#file", spot)  # the page goes on
    expect(browser.locator("#x-facts")).to_have_text(re.compile("spot.png"))


def test_the_command_serves_a_checkpoint_on_this_machine_alone(
    phantom_single: Path, spot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: dict[str, Any] = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **settings: served.update(settings, app=app))
    main(["serve", str(phantom_single), "--port", "8123", "--megabytes", "1"])
    assert (served["host"], served["port"]) == ("127.0.0.1", 8123)
    answer = ask(TestClient(served["app"], "http://127.0.0.1"), spot).json()
    assert set(answer["facts"]) == {"decision", "p(healthy)", "p(opacity)"}
    assert answer["data"]["generated"][0] is not None
    with pytest.raises(ValueError, match=r"host '0\.0\.0\.0' is every address of this machine"):
        main(["serve", str(phantom_single), "--host", "0.0.0.0"])
    monkeypatch.setattr("explainers.__main__.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="serve needs the extra serve"):
        main(["serve", str(phantom_single)])
