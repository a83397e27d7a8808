"""One reader process a host: it reads windows of the store into files that all ranks map.

A separate process keeps the training process's interpreter free, even if the store hangs. Each
look-up has a folder, within one of the user's, in the host's shared folder:

| entry | meaning |
|---|---|
| ``clients`` | shared lock of every process that looks up here |
| ``reader`` | lock of the reader process; a client that can take it starts a new reader |
| ``K.WINDOW.TIME.wanted`` | request for a window of the Kth teacher, read at TIME or later |
| ``K.WINDOW.TIME.ready`` | folder with the window's index, read at TIME, and ``window.json`` |
| ``K.WINDOW.TIME.failed`` | text of the error that reading the window at TIME raised |

TIME is in nanoseconds of the host's monotonic clock. Answers are renamed into place, so that no
client sees half of one. The reader removes the folder when it has no clients left. If the reader
was killed too, the host's next look-up removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from torchrec_exfm.das.errors import StoreError
from torchrec_exfm.das.index import WindowIndex, index_bytes
from torchrec_exfm.das.store import TeacherStore
from torchrec_exfm.das.windows import IndexedWindow, Selection, read_window

__all__ = ["HostReader", "default_folder", "serve"]

_MAX_STARTS = 3  # of a reader without an answer in between, before an error is raised
_IDLE_SECONDS = 0.02
# Empty packages stand in for the real ones, whose imports (torch, TorchRec) take seconds.
_SERVE = """
import sys, types
for name in ("torchrec_exfm", "torchrec_exfm.das"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
from torchrec_exfm.das.host import serve
serve()
"""
_children: list[subprocess.Popen[bytes]] = []  # kept to be polled: an unpolled child is a zombie


def default_folder() -> Path:
    """Return ``/dev/shm``, or the temporary folder where that is small, as in a container."""
    shared = Path("/dev/shm")
    large = shared.is_dir() and shutil.disk_usage(shared).total >= 2**30
    return shared if large else Path(tempfile.gettempdir())


class HostReader:
    """A client of the host's reader process, which it starts if there is none.

    Args:
        sources: for each teacher its store, and what is looked up in it.
        folder: shared folder of the host, in memory or on a local disk.
        max_windows: number of windows of each teacher that the folder holds.
        max_bytes: size of all windows in the folder; None: as much as it has room for.

    Raises:
        StoreError: if the folder can't be used.
    """

    def __init__(
        self,
        sources: Sequence[tuple[TeacherStore, Selection]],
        folder: Path,
        max_windows: int,
        max_bytes: int | None,
    ) -> None:
        self._settings: dict[str, Any] = {
            "sources": [
                {"url": store.url, "options": store.storage_options, "selection": asdict(selection)}
                for store, selection in sources
            ],
            "max_windows": max_windows,
            "max_bytes": max_bytes,
        }
        digest = hashlib.blake2b(json.dumps(self._settings).encode(), digest_size=12).hexdigest()
        self._folder = folder.absolute() / f"torchrec_exfm-{os.getuid()}" / digest
        self._since_ns = time.monotonic_ns()
        self._starts = 0
        self._clients: IO[str] | None = None
        try:
            self._join_clients()
            self._start_reader()
        except OSError as error:
            raise StoreError(
                f"{folder}: can't hold the host's windows ({error}): pass a host_folder that can "
                "be written"
            ) from error

    def start(self, teacher: int, window: int, before: IndexedWindow | None = None) -> Request:
        """Request a window of a teacher; a window that is held already is read as of now."""
        since_ns = self._since_ns if before is None else time.monotonic_ns()
        return Request(self, teacher, window, since_ns, before)

    def forget(self) -> None:
        """Accept no window that was read before now."""
        self._since_ns = time.monotonic_ns()

    def close(self) -> None:
        """Leave the folder; the last client removes it, which ends the reader."""
        clients, self._clients = self._clients, None
        if clients is not None:  # not left to the reader: it may hang in a store
            with clients, contextlib.suppress(FileNotFoundError):
                if _try_lock(clients):
                    _remove_folder(self._folder)

    def request(self, name: str, since_ns: int) -> None:
        """Request a window that is read no earlier than a time."""
        # If the folder was removed, find_answer() makes it again, with this request.
        with contextlib.suppress(FileNotFoundError):
            (self._folder / f"{name}.{since_ns}.wanted").touch()

    def find_answer(
        self, name: str, since_ns: int, before: IndexedWindow | None
    ) -> IndexedWindow | None:
        """Return a window that was read no earlier than a time; None: there is none yet.

        Raises:
            StoreError: if the window could not be read, or no reader can be started.
        """
        answers = [
            (int(entry.suffixes[-2][1:]), entry)
            for entry in self._folder.glob(f"{name}.*")
            if entry.suffix in (".ready", ".failed")
        ]
        read_at_ns, entry = max(answers, default=(0, self._folder))
        # The reader may rename an answer, and another process may remove the folder, meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if read_at_ns < since_ns:
                self._start_reader()
                return None
            self._starts = 0
            if entry.suffix == ".failed":
                self.forget()  # so that the next request is not answered by this failure
                raise StoreError(f"{entry.read_text()} (told by the host's reader)")
            window = _open_window(entry)
            is_same = before is not None and before.files == window.files
            return replace(window, index=before.index) if before and is_same else window
        if not self._folder.exists():
            self.close()
            self._join_clients()
            self.request(name, since_ns)
        return None

    def _join_clients(self) -> None:
        self._clients = _become_client(self._folder)
        weakref.finalize(self, self._clients.close)  # unlock also if nobody calls close()

    def _start_reader(self) -> None:
        """Start a reader, unless the lock says that one is running.

        The child inherits the locked file, so that no other process can start a second reader
        before this one runs.
        """
        with (self._folder / "reader").open("a") as lock:
            if not _try_lock(lock):
                return
            _children[:] = [child for child in _children if child.poll() is None]
            if self._starts == _MAX_STARTS:
                self._starts = 0
                raise StoreError(
                    f"{self._folder}: the process that reads the store has ended {_MAX_STARTS} "
                    "times: was it killed, or did the host run out of memory? See its messages in "
                    "this process's error output"
                )
            self._starts += 1
            child = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # a Ctrl-C in the training's terminal should not kill it
                env={
                    **os.environ,
                    "PYTHONSAFEPATH": "1",
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    "CUDA_VISIBLE_DEVICES": "",  # a reader needs no GPU
                },
            )
            _children.append(child)
            assert child.stdin is not None
            # By a pipe, not as arguments, which all users can read: options may hold credentials.
            # If the child has ended already, the pipe is broken, and a later call starts another.
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                settings = {**self._settings, "folder": str(self._folder), "lock": lock.fileno()}
                stdin.write(json.dumps(settings).encode())


class Request:
    """A window that was requested, as a future; ``done`` looks for the answer."""

    def __init__(
        self,
        reader: HostReader,
        teacher: int,
        window: int,
        since_ns: int,
        before: IndexedWindow | None,
    ) -> None:
        name = f"{teacher}.{window}"
        self._find_answer = functools.partial(reader.find_answer, name, since_ns, before)
        self._answer: IndexedWindow | StoreError | None = None
        if not self.done():
            reader.request(name, since_ns)

    def done(self) -> bool:
        """Return whether the window was read, or failed."""
        if self._answer is None:
            try:
                self._answer = self._find_answer()
            except StoreError as error:
                self._answer = error
        return self._answer is not None

    def result(self) -> IndexedWindow:
        """Return the window, once ``done``; raise a StoreError if it could not be read."""
        if isinstance(self._answer, StoreError):
            raise self._answer
        assert self._answer is not None
        return self._answer


def serve() -> None:
    """Run the reader with the settings on standard input until there are no clients, and exit."""
    with contextlib.suppress(FileNotFoundError):  # the folder was removed
        _Server(**json.load(sys.stdin)).run()
    os._exit(0)  # a normal exit may wait for the library's threads, which may wait for a store


class _Server:
    """The reader process: answers requests, the oldest first."""

    def __init__(
        self, folder: str, lock: int, sources: list[Any], max_windows: int, max_bytes: int | None
    ) -> None:
        self._folder, self._lock = Path(folder), lock
        self._sources = sources
        self._stores: dict[int, TeacherStore] = {}
        for teacher in range(len(sources)):  # opened before the first request, to answer it sooner
            with contextlib.suppress(StoreError):  # raised again, and answered, at a request
                self._store(teacher)
        self._max_windows, self._max_bytes = max_windows, max_bytes
        self._part = self._folder / "part"  # the answer in the making
        # windows of an earlier reader, too; the least recently requested first
        self._held: dict[tuple[int, int], Path] = {}
        for _, teacher, window, path in sorted(self._entries(".ready")):
            self._held[teacher, window] = path

    def run(self) -> None:
        """Answer requests until there are no clients."""
        while not self._remove_if_abandoned():
            wanted = min(self._entries(".wanted"), default=None)
            if wanted is None:
                time.sleep(_IDLE_SECONDS)
            else:
                _, teacher, window, _ = wanted
                self._answer(teacher, window)

    def _entries(self, *suffixes: str) -> Iterator[tuple[int, int, int, Path]]:
        """Yield the time, teacher, window and path of the folder's entries with these suffixes."""
        for entry in self._folder.iterdir():
            if entry.suffix in suffixes:
                teacher, window, time_ns = map(int, entry.stem.split("."))
                yield time_ns, teacher, window, entry

    def _remove_if_abandoned(self) -> bool:
        """Remove the folder if it has no clients; return whether this reader should end."""
        if not os.path.samestat(os.fstat(self._lock), (self._folder / "reader").stat()):
            return True  # a new folder of that name, which has a reader of its own
        with (self._folder / "clients").open() as clients:
            if is_abandoned := _try_lock(clients):
                _remove_folder(self._folder)
        return is_abandoned

    def _answer(self, teacher: int, window: int) -> None:
        """Answer all requests for a window by now: by its index, or by why it can't be read."""
        # The time before the read: a commit made meanwhile may be missing in what is read.
        read_at_ns, key = time.monotonic_ns(), (teacher, window)
        answer = self._folder / f"{teacher}.{window}.{read_at_ns}.ready"
        shutil.rmtree(self._part, ignore_errors=True)
        try:
            old_path = self._held.get(key)
            before = None if old_path is None else _open_window(old_path)
            indexed = self._read(teacher, window, before)
            is_same = before is not None and before.index is indexed.index
            path = old_path if is_same and old_path else self._part
            _write_description(indexed, path)
        except FileNotFoundError:  # the folder was removed: serve() ends
            raise
        except Exception as error:
            kind = "" if isinstance(error, StoreError) else f"{type(error).__name__}: "
            answer = answer.with_suffix(".failed")
            path = self._folder / "failure"
            path.write_text(f"{kind}{error}")
        else:
            self._held.pop(key, None)
            self._held[key] = answer
        path.rename(answer)
        for time_ns, *entry_key, entry in self._entries(".wanted", ".ready", ".failed"):
            if (*entry_key,) != key or time_ns > read_at_ns or entry == answer:
                continue
            if entry.suffix != ".ready":
                entry.unlink()
            elif answer.suffix == ".ready":
                shutil.rmtree(entry)

    def _read(self, teacher: int, window: int, before: IndexedWindow | None) -> IndexedWindow:
        selection = Selection(**self._sources[teacher]["selection"])

        def make_folder(rows: int) -> Path:
            self._make_room(teacher, window, index_bytes(rows, selection.width))
            self._part.mkdir()
            return self._part

        return read_window(self._store(teacher), selection, window, before, make_folder)

    def _store(self, teacher: int) -> TeacherStore:
        if teacher not in self._stores:
            url, options = (self._sources[teacher][name] for name in ("url", "options"))
            self._stores[teacher] = TeacherStore(url, storage_options=options)
        return self._stores[teacher]

    def _make_room(self, teacher: int, window: int, size: int) -> None:
        """Remove the least recently requested windows to make room for one of ``size`` bytes.

        A process that has mapped a removed file keeps its memory until it drops the window.
        """
        others = [key for key in self._held if key != (teacher, window)]
        num_held = sum(other == teacher for other, _ in others)
        limit = sys.maxsize if self._max_bytes is None else self._max_bytes
        for key in others:
            full = size + sum(map(_folder_bytes, self._held.values())) > limit
            if full or (key[0] == teacher and num_held >= self._max_windows):
                shutil.rmtree(self._held.pop(key))
                num_held -= key[0] == teacher
        room = min(limit, shutil.disk_usage(self._folder).free)
        if size > room:
            raise StoreError(
                f"{self._folder}: should have room for a window of {size:,} bytes; has {room:,}: "
                "pass another host_folder or a larger host_bytes, or make windows shorter"
            )


def _write_description(window: IndexedWindow, folder: Path) -> None:
    """Write all of a window but its index as ``window.json``."""
    fields = {name: value for name, value in vars(window).items() if name != "index"}
    text = json.dumps({**fields, "width": window.index.width})
    (folder / "window.new").write_text(text)
    (folder / "window.new").rename(folder / "window.json")


def _open_window(folder: Path) -> IndexedWindow:
    """Return a window whose index is mapped from a folder."""
    fields = json.loads((folder / "window.json").read_text())
    index = WindowIndex.open(folder, fields.pop("width"))
    return IndexedWindow(**{**fields, "index": index, "files": tuple(fields["files"])})


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _try_lock(file: IO[str]) -> bool:
    """Lock a file exclusively, without waiting; return whether that succeeded."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_folder(folder: Path) -> None:
    """Remove a folder; the caller holds the lock of its clients."""
    # Renamed first: a process that comes meanwhile sees no folder, rather than half of one.
    removed = folder.with_name(f"{folder.name}.gone-{os.getpid()}")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _become_client(folder: Path) -> IO[str]:
    """Make a folder if there is none, and return its ``clients`` file with a shared lock.

    Folders of other look-ups whose processes have all ended are removed.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Anyone can make a folder of this name in /dev/shm, and put in windows for us to train on.
    if folder.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder.parent} is another user's")
    for other in folder.parent.iterdir():
        with contextlib.suppress(OSError), (other / "clients").open() as clients:
            if _try_lock(clients):
                _remove_folder(other)
    while True:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile: make it again
            folder.mkdir(mode=0o700, exist_ok=True)
            clients = (folder / "clients").open("a")
            fcntl.flock(clients, fcntl.LOCK_SH)
            # While we waited for the lock, another process may have removed the file we opened.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(clients.fileno()), (folder / "clients").stat()):
                    return clients
            clients.close()
