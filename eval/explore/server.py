"""The explorer over HTTP: a page, and JSON for it. Nobody is remembered; every request says what it is about.

    GET  /                                                the page, its style and scripts (page/)
    GET  /api/setup                                       `Desk.setup`
    GET  /api/picture?picture=ID[&size=N]                 a JPEG, its longer side at most N pixels
    POST /api/pictures?name=NAME                          the body is an image file; {"id", "name"}
    GET  /api/summary?model=0&picture=ID                  `Desk.summary`
    GET  /api/attention?model=0&picture=ID&layer=2[&patch=17]
    GET  /api/components?model=0&picture=ID&which=all
    GET  /api/masks?model=0&picture=ID&layer=2

What goes wrong is {"error": a sentence} with a status of 4xx; a fault of ours is 500, its traceback in the log.
"""

import asyncio
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crate_fast.errors import UserError
from crate_fast.eval.explore.desk import Desk
from crate_fast.eval.explore.pictures import LARGEST_UPLOAD, UnknownPictureError, UnreadablePictureError
from crate_fast.train.checkpoint import CheckpointError

__all__ = ["application"]

_PAGE = Path(__file__).parent / "page"
_FILES = {path.name: path for path in sorted(_PAGE.iterdir()) if path.suffix in (".html", ".css", ".js", ".svg")}
_LARGEST_VIEW = 1024
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FAULTS: dict[type[UserError], int] = {
    UnknownPictureError: 404,
    UnreadablePictureError: 422,
    CheckpointError: 422,
    UserError: 400,
}


class _Guard:
    """Puts the headers on every answer; refuses other sites' pages, and other names pointed at this computer."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            await _problem(403, f"this explorer is not called {host!r}")(scope, receive, with_headers)
        elif origin is not None and origin.partition("://")[2] != host:
            await _problem(403, f"a page of {origin} may not use this explorer")(scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _problem(status: int, text: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers)


def _number(request: Request, name: str, default: int | None = None) -> int | None:
    word = request.query_params.get(name)
    if word is None or word == "":
        if default is None and name not in ("patch",):
            raise UserError(f"the request lacks {name}=…, a whole number")
        return default
    if not (word.isascii() and word.isdecimal()) or len(word) > 9:
        raise UserError(f"{name}={word[:40]!r}: a whole number, from 0")
    return int(word)


async def _answer(compute: Callable, *arguments) -> Response:
    """What a function of a worker thread returns, as JSON, or its complaint."""
    try:
        found = await run_in_threadpool(compute, *arguments)
    except UserError as error:
        status = next(status for kind, status in _FAULTS.items() if isinstance(error, kind))
        return _problem(status, str(error))
    return found if isinstance(found, Response) else JSONResponse(found)


async def _body(request: Request) -> bytes | None:
    """The body, or None as soon as it is too long."""
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > LARGEST_UPLOAD:
            return None
        parts.append(part)
    return b"".join(parts)


def _jpeg(desk: Desk, key: str, size: int) -> Response:
    picture = desk.pictures.view(key)
    picture.thumbnail((size, size))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=92, subsampling=0)
    return Response(out.getvalue(), media_type="image/jpeg")


class _Routes:
    def __init__(self, desk: Desk):
        self.desk = desk
        self.uploading = asyncio.Semaphore(4)  # bodies held at once

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        return FileResponse(_FILES[name]) if name in _FILES else _problem(404, "there is no such page")

    async def setup(self, _request: Request) -> Response:
        return await _answer(self.desk.setup)

    async def picture(self, request: Request) -> Response:
        def draw() -> Response:
            size = max(16, min(_number(request, "size", 640), _LARGEST_VIEW))
            return _jpeg(self.desk, request.query_params.get("picture", ""), size)

        return await _answer(draw)

    async def upload(self, request: Request) -> Response:
        name = Path(request.query_params.get("name", "")).name[:120] or "the picture"
        try:
            async with self.uploading:
                data = await _body(request)
        except ClientDisconnect:
            return _problem(400, f"the upload of {name} broke off")
        if data is None:
            limit = LARGEST_UPLOAD // 2**20
            return _problem(413, f"{name} has more than {limit} MiB: make it smaller", Connection="close")
        return await _answer(lambda: {"id": self.desk.pictures.add(data, name), "name": name})

    def about(self, ask: Callable[[Request, int, str], dict]) -> Callable:
        """A route for a question about one model and one picture."""

        async def route(request: Request) -> Response:
            def compute() -> dict:
                return ask(request, _number(request, "model"), request.query_params.get("picture", ""))

            return await _answer(compute)

        return route


def application(desk: Desk, hosts: Sequence[str] | None = None) -> Starlette:
    """The explorer as an ASGI application.

    Args:
        desk: What it shows.
        hosts: Names by which it may be addressed, so that no other site's name can be pointed at it; all when None.
    """
    routes = _Routes(desk)
    questions: dict[str, Callable[[Request, int, str], dict]] = {
        "summary": lambda _, model, picture: desk.summary(model, picture),
        "attention": lambda r, model, picture: desk.attention(
            model, picture, _number(r, "layer"), _number(r, "patch")
        ),
        "components": lambda r, model, picture: desk.components(model, picture, r.query_params.get("which", "all")),
        "masks": lambda r, model, picture: desk.masks(model, picture, _number(r, "layer")),
    }
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/api/setup", routes.setup),
            Route("/api/picture", routes.picture),
            Route("/api/pictures", routes.upload, methods=["POST"]),
            *(Route(f"/api/{name}", routes.about(ask)) for name, ask in questions.items()),
            Route("/{name}", routes.page),
        ],
        middleware=[Middleware(_Guard, hosts=hosts)],
    )
    app.router.redirect_slashes = False
    return app
