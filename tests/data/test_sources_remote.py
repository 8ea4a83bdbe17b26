"""Corpora in an object store and on a web server, both on this machine."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from castalia.data.sources import describe_inputs, iter_documents
from castalia.errors import UserError

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("flask_cors")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A store with a bucket `corpus`; fsspec finds it by its environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        store = boto3.client("s3")
        store.create_bucket(Bucket="corpus")
        files = {
            "part/a.jsonl": b'"a1"\n"a2"\n',
            "part/b.jsonl.gz": gzip.compress(b'"b1"\n'),
            "part/README.pdf": b"no text",
            "other/c.txt": b"c",
            "bad.jsonl": b'"ok"\n{\n',
            "cut.jsonl.gz": gzip.compress(b'"x"\n' * 999)[:-4],
        }
        for key, content in files.items():
            store.put_object(Bucket="corpus", Key=key, Body=content)
        yield "s3://corpus/"
    server.stop()


def texts(*inputs: str) -> list[str]:
    return [d.text for d in iter_documents(inputs)]


def test_object_store(bucket: str) -> None:
    assert texts(bucket + "part/a.jsonl", bucket + "other/c.txt") == ["a1", "a2", "c"]
    assert texts(bucket + "part") == texts(bucket + "part/*.jsonl*") == ["a1", "a2", "b1"]
    described = describe_inputs(bucket + "part/*.jsonl")
    assert [(d["name"], d["bytes"]) for d in described] == [(bucket + "part/a.jsonl", 10)]
    assert described[0]["mtime_ns"] > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad.jsonl", "s3://corpus/bad.jsonl:2 is not valid JSON"),
        ("cut.jsonl.gz", "s3://corpus/cut.jsonl.gz is damaged or truncated"),
        ("none.jsonl", "s3://corpus/none.jsonl does not exist"),
        ("none*.jsonl", "matches no text"),
        ("part/README.pdf", "has an unknown ending"),
    ],
)
def test_faults_in_an_object_store(bucket: str, name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        texts(bucket + name)
    assert words in str(caught.value)


def test_unknown_kinds_of_address() -> None:
    with pytest.raises(UserError, match="gopher://a/b.txt cannot be read"):
        texts("gopher://a/b.txt")


def test_web_server(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(f"line {n}") + "\n" for n in range(5000)))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            assert texts(url + "a.jsonl")[-1] == "line 4999"
            with pytest.raises(UserError, match="none.jsonl does not exist"):
                texts(url + "none.jsonl")
        finally:
            server.shutdown()
            thread.join()
