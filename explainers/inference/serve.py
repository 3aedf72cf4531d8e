"""A local page that explains what is dropped on it; nothing leaves the machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from explainers.inference.explain import ENDINGS

Explain = Callable[[Path, int | None], Mapping[str, Any]]
LOCAL = ("127.0.0.1", "localhost", "[::1]")
READING, PATIENCE = 4, 30.0  # uploads at a time, and seconds that one may take
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
POLICY += "img-src blob: data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"


def application(
    explain: Explain,
    explorer: Markup,
    title: str,
    limit: int = 2**26,
    hosts: tuple[str, ...] = LOCAL,
) -> FastAPI:
    """The page at / and, behind it, POST /explain?name=..&frame=..: a file in, JSON out.

    Images are explained one after the other; as many as READING are held in memory, each of at most
    ``limit`` bytes.

    Args:
        explain: File and frame in; facts, data and ranges for the explorer out. A ValueError is
            told to the reader.
        explorer: Part of the page that shows them.
        title: Of the page.
        limit: Largest upload, bytes.
        hosts: Names that the server may be asked by: a page elsewhere cannot reach it under a
            name of its own.
    """
    source = (files("explainers.inference") / "serve.html").read_text("utf-8")
    page = Environment(autoescape=True).from_string(source).render(title=title, explorer=explorer)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    reading, explaining = asyncio.Semaphore(READING), asyncio.Semaphore(1)

    @app.get("/")
    def shown() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    @app.post("/explain")
    async def explained(request: Request, name: str = "", frame: str = "") -> Response:
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return JSONResponse({"error": "only this server's own page may ask."}, 403)
        if frame and not (frame.isascii() and frame.isdigit()):
            return JSONResponse({"error": f"frame must be a whole number, but got {frame!r}."}, 422)
        async with reading:
            try:
                content = await asyncio.wait_for(read(request, limit), PATIENCE)
            except TimeoutError:
                return JSONResponse({"error": f"the upload took more than {PATIENCE:g} s."}, 408)
            except ValueError as error:
                return JSONResponse({"error": str(error)}, 413)
            async with explaining:
                return await run_in_threadpool(answered, explain, content, name, frame)

    return app


async def read(request: Request, limit: int) -> bytes:
    """The body, or a ValueError as soon as it is too large."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > limit:
            raise ValueError(f"the file has more than {limit / 2**20:g} MB, the limit.")
    return bytes(content)


def answered(explain: Explain, content: bytes, name: str, frame: str) -> Response:
    """The explanation of an upload, kept under a name of ours while it is read."""
    ending = Path(name).suffix.lower()
    with TemporaryDirectory(prefix="explain") as folder:
        path = Path(folder) / f"upload{ending if ending in ENDINGS else ''}"
        path.write_bytes(content)
        try:
            return JSONResponse(explain(path, int(frame) if frame else None))
        except ValueError as error:
            told = str(error).replace(str(path), Path(name).name or "upload")
            return JSONResponse({"error": told}, 422)
        except Exception as error:  # whatever a model fails with: the page goes on
            logging.getLogger(__name__).exception("an upload was not explained")
            return JSONResponse({"error": f"the model failed: {type(error).__name__}."}, 500)
