"""The folder of a table, whose files are opened without following a link out of it."""

from __future__ import annotations

import functools
import os

import pyarrow.fs as pa_fs
from deltalake.fs import DeltaStorageHandler

from torchrec_exfm.das.errors import StoreError


class Folder:
    """A local folder, or one of an object store, where links do not exist."""

    def __init__(self, url: str, storage_options: dict[str, str]) -> None:
        self.url = url
        self.options = storage_options

    @functools.cached_property
    def filesystem(self) -> pa_fs.FileSystem:
        """The filesystem whose paths are relative to the folder."""
        if "://" not in self.url:
            return pa_fs.SubTreeFileSystem(self.url, pa_fs.LocalFileSystem())
        return pa_fs.PyFileSystem(DeltaStorageHandler(self.url, self.options))

    def is_file(self, path: str) -> bool:
        """Return whether the file exists."""
        return bool(self.filesystem.get_file_info(path).type == pa_fs.FileType.File)

    def check_inside(self, path: str) -> None:
        """Raise a StoreError for a path that leaves the folder by a link or is no regular file."""
        if "://" not in self.url:
            root, target = os.path.realpath(self.url), os.path.realpath(f"{self.url}/{path}")
            if not target.startswith(root + os.sep):
                raise self.refusal(path)
            # opening a pipe would wait for ever
            if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
                raise StoreError(f"{self.url}/{path}: is no regular file: it is not of this table")

    def check_links(self) -> None:
        """Raise a StoreError for any link that leaves the folder: the library would follow it."""
        for folder, folders, files in os.walk(self.url):  # yields nothing for a URL
            for name in folders + files:
                path = os.path.join(folder, name)
                if os.path.islink(path):
                    self.check_inside(os.path.relpath(path, self.url))

    def refusal(self, path: str) -> StoreError:
        """Return the error for a path that leaves the folder."""
        return StoreError(
            f"{self.url}: the file {path!r} is refused: it is not in the table's folder"
        )
