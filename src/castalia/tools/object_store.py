"""An object store on this machine that can be told to fail, for tests and certificates (needs moto, flask and s3fs).

with refusing_store("runs") as store:       s3://runs/... is served; the environment says where
    store.refuse("PUT")                     until further notice, 403
    store.refuse("PUT", times=1, status="500 Internal Server Error")
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ALWAYS = 1 << 30


class Refusing:
    """A web application in front of another that refuses what it is told to."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._left, self._status = inner, 0, ""
        self._methods: tuple[str, ...] = ()

    def refuse(self, *methods: str, times: int = ALWAYS, status: str = "403 Forbidden") -> None:
        """Answer so many requests with these methods so; without methods, refuse nothing any more."""
        self._methods, self._left, self._status = methods, times, status

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        if environ["REQUEST_METHOD"] not in self._methods or self._left < 1:
            return self._inner(environ, start)
        self._left -= 1
        code = "AccessDenied" if self._status.startswith("403") else "InternalError"
        start(self._status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]


@contextmanager
def refusing_store(bucket: str) -> Iterator[Refusing]:
    """Serve an empty bucket, and let S3's clients in this process find it."""
    import s3fs  # type: ignore[import-untyped]
    from moto.moto_server import threaded_moto_server as moto

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would note every request
    made: Any = moto
    application = Refusing(made.DomainDispatcherApplication(made.create_backend_app))
    server = made.make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    given = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    s3fs.S3FileSystem.clear_instance_cache()  # which know another store, perhaps
    try:
        s3fs.S3FileSystem().makedirs(bucket, exist_ok=True)
        yield application
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
