"""A second home of a run's checkpoints, at any URL that fsspec knows: s3://, gs://, file://, memory://, ...

    checkpoints/step-N/ ──its files, then manifest.json──> URL/step-N/ ──> URL/latest
    URL/step-N/ ──files, held against the manifest──> checkpoints/step-N/      (a run that lost its folder)

The local folder stays the first: a checkpoint is uploaded when it is whole, so an object store that
fails costs nothing but its copy, and what it lacks is uploaded after the next save. There is no
renaming in object stores; what makes a copy whole is its manifest, which comes last and goes first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from castalia.checkpoint.layout import (
    LATEST,
    MANIFEST,
    WRITING,
    problems_of,
    read_manifest,
    step_name,
    step_of,
    surplus,
    sync_directory,
)
from castalia.checkpoint.save import put_in_place
from castalia.errors import UserError

CHUNK = 100 << 20
_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})


class MirrorFailed(UserError):
    """The place of the copies could not be reached, or refused. Nothing is lost here."""


class Mirror:
    """The copies of one run's checkpoints.

    Args:
        url: of the folder that holds them.
        chunk_size: bytes sent at once.

    Raises:
        UserError: fsspec does not know such a URL, or what it needs for it is not installed.
    """

    def __init__(self, url: str, chunk_size: int = CHUNK) -> None:
        import fsspec

        self.url, self._chunk = url.rstrip("/"), chunk_size
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            need = " (pip install 'castalia[remote]')" if "s3" in url.split(":")[0] else ""
            raise UserError(f"checkpoint.path: {url} cannot be used: {error}{need}") from None
        self._root = str(root).rstrip("/")
        self._equal: set[str] = set()  # names of copies that are known to be of what is here

    def steps(self) -> list[int]:
        """Steps of the whole copies, in order.

        Raises:
            MirrorFailed: they cannot be listed.
        """
        with self._reported("its checkpoints could not be listed"):
            self._fs.invalidate_cache()
            try:
                paths: list[str] = self._fs.find(self._root)
            except FileNotFoundError:
                return []
        ends = [path.rsplit("/", 2)[-2:] for path in paths]
        return sorted(step for name, *file in ends if file == [MANIFEST] and (step := step_of(name)) is not None)

    def update(self, directory: Path, keep_last: int | None = None, keep_every: int | None = None) -> list[str]:
        """Upload every whole checkpoint that is here and not there, the newest first; then delete old copies.

        Returns:
            The names of those that were uploaded.

        Raises:
            MirrorFailed: the first that failed.
        """
        names = {path.name: step for path in directory.iterdir() if (step := step_of(path.name)) is not None}
        there = self.steps()
        self._equal &= {step_name(step) for step in there}
        uploaded = []
        for name in sorted(names, key=lambda n: names[n], reverse=True):
            if name in self._equal or problems_of(directory / name, hashes=False):
                continue
            with self._reported(f"{name} could not be uploaded"):
                if self._upload(directory / name):
                    uploaded.append(name)
            self._equal.add(name)
        with self._reported("old copies could not be deleted"):
            if uploaded:
                self._fs.pipe_file(f"{self._root}/{LATEST}", f"{uploaded[0]}\n".encode())
                newest = names[uploaded[0]]
                for step in surplus({*there, *map(names.__getitem__, uploaded)}, newest, keep_last, keep_every):
                    self._forget(step_name(step))
        return uploaded

    def fetch(self, step: int, directory: Path) -> Path:
        """Download a step's checkpoint, and put it in its place when it agrees with its manifest.

        Raises:
            MirrorFailed: it cannot be read, or is damaged.
        """
        name = step_name(step)
        writing = directory / f"{WRITING}{name}"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            with self._reported(f"{name} could not be downloaded"):
                self._download(name, MANIFEST, writing)
                for file in read_manifest(writing)[1]:
                    self._download(name, file, writing)
            problems = problems_of(writing)
            if problems:
                raise MirrorFailed(f"{self.url}/{name}: is damaged ({problems[0].removeprefix(f'{writing}/')})")
            sync_directory(writing)
            final = put_in_place(directory, writing)
        finally:
            shutil.rmtree(writing, ignore_errors=True)
        self._equal.add(name)
        return final

    def set_aside(self, step: int) -> None:
        """Make copies of later steps count no more; their manifests are renamed, nothing is deleted.

        Raises:
            MirrorFailed: they still count.
        """
        for later in (s for s in self.steps() if s > step):
            manifest = f"{self._root}/{step_name(later)}/{MANIFEST}"
            with self._reported(f"{step_name(later)} could not be set aside"):
                self._fs.mv(manifest, f"{manifest}.set-aside")
            self._equal.discard(step_name(later))

    def _upload(self, path: Path) -> bool:
        """Copy a checkpoint; False if the same is there already."""
        there = f"{self._root}/{path.name}"
        manifest = (path / MANIFEST).read_bytes()
        if self._fs.exists(f"{there}/{MANIFEST}"):
            if self._fs.cat_file(f"{there}/{MANIFEST}") == manifest:
                return False
            self._fs.rm_file(f"{there}/{MANIFEST}")
        protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        if not _WITHOUT_FOLDERS & set(protocols):
            self._fs.makedirs(there, exist_ok=True)
        for name, record in read_manifest(path)[1].items():
            with (path / name).open("rb") as source, self._fs.open(f"{there}/{name}", "wb", self._chunk) as sink:
                shutil.copyfileobj(source, sink, self._chunk)
            size = self._fs.info(f"{there}/{name}", **self._fresh)["size"]
            if size != record.size:
                raise OSError(f"{name} has {size} bytes there, {record.size} here")
        self._fs.pipe_file(f"{there}/{MANIFEST}", manifest)
        return True

    @property
    def _fresh(self) -> dict[str, Any]:
        """Keeps object stores' clients from answering out of their cache."""
        return {"refresh": True} if "s3" in self._fs.protocol else {}

    def _download(self, name: str, file: str, into: Path) -> None:
        with self._fs.open(f"{self._root}/{name}/{file}", "rb") as source, (into / file).open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 22)
            sink.flush()
            os.fsync(sink.fileno())

    def _forget(self, name: str) -> None:
        """Delete a copy, its manifest first."""
        self._fs.rm_file(f"{self._root}/{name}/{MANIFEST}")
        self._fs.rm(f"{self._root}/{name}", recursive=True)
        self._equal.discard(name)

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each of fsspec's many clients has exceptions of its own
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise MirrorFailed(f"{self.url}: {what} ({type(error).__name__}: {first})") from error
