"""HTTP server of the explorer: the page and its JSON API. Requests are independent; there are no sessions.

    GET  /                                                     the page, its style and scripts (page/)
    GET  /api/setup                                            `Explorer.setup`
    GET  /api/picture?picture=ID[&size=N]                      a JPEG, its longer side at most N pixels
    POST /api/pictures?name=NAME                               {"id", "name"}; the request body is an image file
    GET  /api/summary?model=0&picture=ID                       `Inspection.summary`
    GET  /api/attention?model=0&picture=ID&layer=2[&patch=17]  `Inspection.attention`
    GET  /api/components?model=0&picture=ID&which=all          `Inspection.components`
    GET  /api/masks?model=0&picture=ID&layer=2                 `Inspection.masks`

A user's error returns {"error": message} with status 400. A bug returns status 500; its traceback is in the log.
"""

import io
import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from crate_fast.errors import UserError
from crate_fast.eval.explore.inspection import Explorer, Inspection
from crate_fast.eval.explore.pictures import MAX_UPLOAD_BYTES, Pictures

_PAGE = Path(__file__).parent / "page"
_MAX_VIEW_SIDE = 1024
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _error(status: int, text: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers)


def _integer(request: Request, name: str, *default: int | None) -> int | None:
    word = request.query_params.get(name)
    if not word:
        if not default:
            raise UserError(f"the request lacks {name}: give an integer from 0")
        return default[0]
    if not (word.isascii() and word.isdecimal()) or len(word) > 9:
        raise UserError(f"{name}={word[:40]!r}: give an integer from 0")
    return int(word)


async def _body(request: Request) -> bytes | None:
    """Return the request body, or None as soon as it exceeds the limit."""
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > MAX_UPLOAD_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _jpeg(pictures: Pictures, request: Request) -> Response:
    size = max(16, min(_integer(request, "size", 640), _MAX_VIEW_SIDE))
    picture = pictures.view(request.query_params.get("picture", ""))
    picture.thumbnail((size, size))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=92, subsampling=0)
    return Response(out.getvalue(), media_type="image/jpeg")


def _is_address(name: str | None) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def application(explorer: Explorer, hosts: Sequence[str], addresses: bool = False) -> Starlette:
    """Build the ASGI application. Requests may use the host names `hosts`, and with `addresses` any IP address."""
    names, pictures = [host.lower() for host in hosts], explorer.pictures

    async def guard(request: Request, answer: RequestResponseEndpoint) -> Response:
        """Add the headers; reject pages of other sites, unknown host names (DNS rebinding) and former servers."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        name, session = _host_name(host), request.query_params.get("session", explorer.session)
        if name not in names and not (addresses and _is_address(name)):
            remedy = "use the address that it printed, or a tunnel (ssh -L)"
            response = _error(403, f"{host!r} is not a host name of this explorer: {remedy}")
        elif session != explorer.session:
            response = _error(400, "the explorer was restarted: reload the page")
        elif origin is not None and origin.partition("://")[2] != host:
            response = _error(403, f"a page of {origin} may not use this explorer: open the explorer's own page")
        else:
            response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    async def upload(request: Request) -> Response:
        name = Path(request.query_params.get("name", "")).name[:120] or "the picture"
        try:
            data = await _body(request)
        except ClientDisconnect:
            return _error(400, f"the upload of {name} was interrupted: try again")
        if data is None:
            limit = MAX_UPLOAD_BYTES // 2**20
            return _error(413, f"{name} has more than {limit} MiB: make it smaller", Connection="close")
        return JSONResponse({"id": await run_in_threadpool(pictures.add, data, name), "name": name})

    def inspection(request: Request) -> Inspection:
        return explorer.inspection(_integer(request, "model"), request.query_params.get("picture", ""))

    def attention(request: Request) -> dict:
        layer, patch = _integer(request, "layer"), _integer(request, "patch", None)
        return inspection(request).attention(layer, patch)

    queries: dict[str, Callable[[Request], dict]] = {
        "setup": lambda _: explorer.setup(),
        "summary": lambda request: inspection(request).summary,
        "attention": attention,
        "components": lambda request: inspection(request).components(request.query_params.get("which", "all")),
        "masks": lambda request: inspection(request).masks(_integer(request, "layer")),
    }

    app = Starlette(
        routes=[
            # starlette calls these in worker threads
            *(Route(f"/api/{n}", lambda request, query=q: JSONResponse(query(request))) for n, q in queries.items()),
            Route("/api/picture", lambda request: _jpeg(pictures, request)),
            Route("/api/pictures", upload, methods=["POST"]),
            Mount("/", StaticFiles(directory=_PAGE, html=True)),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers={UserError: lambda _, error: _error(400, str(error))},
    )
    app.router.redirect_slashes = False
    return app
