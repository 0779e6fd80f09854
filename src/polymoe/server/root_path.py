"""`--root-path`: the server behind a proxy, under a path of a larger site."""

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPathMiddleware:
    """Takes the prefix off, for proxies that leave it; what comes without it is served too, for those that do not.

    Before anything that looks at the path, the key's check above all.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._prefix = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._prefix + "/"):
            scope = {**scope, "path": scope["path"][len(self._prefix) :]}
            raw = scope.get("raw_path")
            if raw is not None and raw.startswith(self._prefix.encode()):
                scope["raw_path"] = raw[len(self._prefix.encode()) :]
        await self._app(scope, receive, send)
