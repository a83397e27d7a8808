"""A window once a host: a process of its own reads the store, all ranks map the files it makes.

To read in another process keeps the training process's interpreter free, whatever the store does.
The folder of a look-up, in a folder of the user's within that of the host:

| entry | |
|---|---|
| ``clients`` | locked, shared, by every process that looks up here |
| ``reader`` | locked by the process that reads; whoever finds it free starts another |
| ``K.WINDOW.TIME.wanted`` | a window of the Kth teacher is asked for, as of TIME or later |
| ``K.WINDOW.TIME.ready`` | a folder: the window's index as of TIME, and ``window.json`` |
| ``K.WINDOW.TIME.failed`` | why the window could not be read at TIME |

TIME is in nanoseconds of the host's monotonic clock. Entries appear whole, by renaming. The reader
removes the folder when it has no clients; if it was killed too, the host's next look-up does.
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

_STARTS = 3  # of a reader, until it is given up
_IDLE_SECONDS = 0.02
# The packages are folders alone, since all that they import takes seconds, and isn't needed.
_SERVE = """
import sys, types
for name in ("torchrec_exfm", "torchrec_exfm.das"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
from torchrec_exfm.das.host import serve
serve()
"""
_children: list[subprocess.Popen[bytes]] = []  # to be asked for their exit status, one day


def default_folder() -> Path:
    """Memory that the host's processes share, or where it is small (in a container) a disk."""
    shared = Path("/dev/shm")
    large = shared.is_dir() and shutil.disk_usage(shared).total >= 2**30
    return shared if large else Path(tempfile.gettempdir())


class HostReader:
    """Asks the host's reader for windows, and starts it where there is none.

    Args:
        sources: for each teacher its store, and what of it is looked up.
        folder: of the host, in memory or on a local disk.
        max_windows: how many of each teacher the folder holds.
        max_bytes: of all windows in the folder; None: what it has room for.

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
        self._not_before_ns = time.monotonic_ns()
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

    def start(
        self, teacher: int, window: int, before: IndexedWindow | None = None
    ) -> PendingWindow:
        """Ask for a window of a teacher: as of now, if it is one that is known from ``before``."""
        not_before_ns = self._not_before_ns if before is None else time.monotonic_ns()
        return PendingWindow(self, teacher, window, not_before_ns, before)

    def forget(self) -> None:
        """From now on, ask for windows as they are now."""
        self._not_before_ns = time.monotonic_ns()

    def close(self) -> None:
        """Leave the folder: who is the last removes it, and the reader ends."""
        clients, self._clients = self._clients, None
        if clients is not None:
            with clients, contextlib.suppress(FileNotFoundError):
                if _try_lock(clients):
                    _remove_folder(self._folder)

    def request(self, name: str, not_before_ns: int) -> None:
        """Let the reader know that a window is wanted as of a time."""
        with contextlib.suppress(
            FileNotFoundError
        ):  # the folder was removed: find_answer() sees to it
            (self._folder / f"{name}.{not_before_ns}.wanted").touch()

    def find_answer(
        self, name: str, not_before_ns: int, before: IndexedWindow | None
    ) -> IndexedWindow | None:
        """The window of a name, if it is there as of a time.

        Raises:
            StoreError: if it can't be read.
        """
        answers = [
            (int(entry.suffixes[-2][1:]), entry)
            for entry in self._folder.glob(f"{name}.*")
            if entry.suffix in (".ready", ".failed")
        ]
        when, entry = max(answers, default=(0, self._folder))
        with contextlib.suppress(FileNotFoundError):  # renamed, or the folder was removed
            if when < not_before_ns:
                self._start_reader()
                return None
            self._starts = 0
            if entry.suffix == ".failed":
                self.forget()  # to ask again is to ask anew
                raise StoreError(f"{entry.read_text()} (told by the host's reader)")
            window = _open_window(entry)
            same = before is not None and before.files == window.files
            return replace(window, index=before.index) if before and same else window
        if not self._folder.exists():
            self.close()
            self._join_clients()
            self.request(name, not_before_ns)
        return None

    def _join_clients(self) -> None:
        self._clients = _become_client(self._folder)
        weakref.finalize(self, self._clients.close)  # of a look-up that nobody closes

    def _start_reader(self) -> None:
        """Start one, unless one has the lock; it is started with the lock, so that one starts."""
        with (self._folder / "reader").open("a") as lock:
            if not _try_lock(lock):
                return
            _children[:] = [child for child in _children if child.poll() is None]
            if self._starts == _STARTS:
                self._starts = 0
                raise StoreError(
                    f"{self._folder}: the process that reads the store has ended {_STARTS} times: "
                    "was it killed, or the host's memory used up? Its own words are in this "
                    "process's error output"
                )
            self._starts += 1
            child = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # signals to the training's group are not for it
                env={
                    **os.environ,
                    "PYTHONSAFEPATH": "1",
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    "CUDA_VISIBLE_DEVICES": "",
                },
            )
            _children.append(child)
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                told = {**self._settings, "folder": str(self._folder), "lock": lock.fileno()}
                stdin.write(json.dumps(told).encode())


class PendingWindow:
    """A window that was asked for, as a future: ``done`` looks for it."""

    def __init__(
        self,
        reader: HostReader,
        teacher: int,
        window: int,
        not_before_ns: int,
        before: IndexedWindow | None,
    ) -> None:
        name = f"{teacher}.{window}"
        self._find_answer = functools.partial(reader.find_answer, name, not_before_ns, before)
        self._answer: IndexedWindow | StoreError | None = None
        if not self.done():
            reader.request(name, not_before_ns)

    def done(self) -> bool:
        """Whether it is there, or can't be had."""
        if self._answer is None:
            try:
                self._answer = self._find_answer()
            except StoreError as error:
                self._answer = error
        return self._answer is not None

    def result(self) -> IndexedWindow:
        """The window, when it is done; a StoreError if it can't be had."""
        if isinstance(self._answer, StoreError):
            raise self._answer
        assert self._answer is not None
        return self._answer


def serve() -> None:
    """Be the reader, of what the standard input says, until there are no clients."""
    with contextlib.suppress(FileNotFoundError):  # the folder was removed
        _Server(**json.load(sys.stdin)).run()
    os._exit(0)  # nothing is left to be done, and the library's threads may still wait for a store


class _Server:
    def __init__(
        self, folder: str, lock: int, sources: list[Any], max_windows: int, max_bytes: int | None
    ) -> None:
        self._folder, self._lock = Path(folder), lock
        self._sources = sources
        self._stores: dict[int, TeacherStore] = {}
        for teacher in range(len(sources)):  # while nobody waits
            with contextlib.suppress(StoreError):  # told to who asks for a window
                self._store(teacher)
        self._max_windows, self._max_bytes = max_windows, max_bytes
        self._part = self._folder / "part"  # what is being made
        # what a reader before this one has made, too; what was asked for last comes last
        self._held: dict[tuple[int, int], Path] = {}
        for _, teacher, window, path in sorted(self._entries(".ready")):
            self._held[teacher, window] = path

    def run(self) -> None:
        while not self._remove_if_abandoned():
            wanted = min(self._entries(".wanted"), default=None)
            if wanted is None:
                time.sleep(_IDLE_SECONDS)
            else:
                _, teacher, window, _ = wanted
                self._answer(teacher, window)

    def _entries(self, *suffixes: str) -> Iterator[tuple[int, int, int, Path]]:
        for entry in self._folder.iterdir():
            if entry.suffix in suffixes:
                teacher, window, when = map(int, entry.stem.split("."))
                yield when, teacher, window, entry

    def _remove_if_abandoned(self) -> bool:
        if not os.path.samestat(os.fstat(self._lock), (self._folder / "reader").stat()):
            return True  # the folder was made anew, and has another reader
        with (self._folder / "clients").open() as clients:
            if left := _try_lock(clients):
                _remove_folder(self._folder)
        return left

    def _answer(self, teacher: int, window: int) -> None:
        """Read a window, or see that it is as it was, and say so; or say why it can't be read."""
        not_before_ns, key = time.monotonic_ns(), (teacher, window)
        answer = self._folder / f"{teacher}.{window}.{not_before_ns}.ready"
        shutil.rmtree(self._part, ignore_errors=True)
        try:
            old = self._held.get(key)
            before = None if old is None else _open_window(old)
            made = self._read(teacher, window, before)
            same = before is not None and before.index is made.index
            place = old if same and old else self._part
            _write_description(made, place)
        except FileNotFoundError:
            raise
        except Exception as error:
            kind = "" if isinstance(error, StoreError) else f"{type(error).__name__}: "
            answer = answer.with_suffix(".failed")
            place = self._folder / "failure"
            place.write_text(f"{kind}{error}")
        else:
            self._held.pop(key, None)
            self._held[key] = answer
        place.rename(answer)
        for when, *of, entry in self._entries(".wanted", ".ready", ".failed"):
            if (*of,) != key or when > not_before_ns or entry == answer:
                continue
            if entry.suffix != ".ready":
                entry.unlink()
            elif answer.suffix == ".ready":
                shutil.rmtree(entry)

    def _read(self, teacher: int, window: int, before: IndexedWindow | None) -> IndexedWindow:
        selection = Selection(**self._sources[teacher]["selection"])

        def room(rows: int) -> Path:
            self._make_room(teacher, window, index_bytes(rows, selection.width))
            self._part.mkdir()
            return self._part

        return read_window(self._store(teacher), selection, window, before, room)

    def _store(self, teacher: int) -> TeacherStore:
        if teacher not in self._stores:
            url, options = (self._sources[teacher][name] for name in ("url", "options"))
            self._stores[teacher] = TeacherStore(url, storage_options=options)
        return self._stores[teacher]

    def _make_room(self, teacher: int, window: int, size: int) -> None:
        """Let the windows go that were asked for longest ago; who has them mapped keeps them."""
        others = [key for key in self._held if key != (teacher, window)]
        left = sum(of == teacher for of, _ in others)
        limit = sys.maxsize if self._max_bytes is None else self._max_bytes
        for key in others:
            full = size + sum(map(_folder_bytes, self._held.values())) > limit
            if full or (key[0] == teacher and left >= self._max_windows):
                shutil.rmtree(self._held.pop(key))
                left -= key[0] == teacher
        room = min(limit, shutil.disk_usage(self._folder).free)
        if size > room:
            raise StoreError(
                f"{self._folder}: should have room for a window of {size:,} bytes; has {room:,}: "
                "pass another host_folder or a larger host_bytes, or make windows shorter"
            )


def _write_description(window: IndexedWindow, folder: Path) -> None:
    told = {name: value for name, value in vars(window).items() if name != "index"}
    text = json.dumps({**told, "width": window.index.width})
    (folder / "window.new").write_text(text)
    (folder / "window.new").rename(folder / "window.json")


def _open_window(folder: Path) -> IndexedWindow:
    told = json.loads((folder / "window.json").read_text())
    index = WindowIndex.open(folder, told.pop("width"))
    return IndexedWindow(**{**told, "index": index, "files": tuple(told["files"])})


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _try_lock(file: IO[str]) -> bool:
    """Whether a file could be locked without waiting for others."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_folder(folder: Path) -> None:
    """Remove a folder whose clients' lock is held; those that come now find none of it."""
    removed = folder.with_name(f"{folder.name}.gone-{os.getpid()}")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _become_client(folder: Path) -> IO[str]:
    """Become a client of a folder, which is made anew if it has none; its lock."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder.parent} is another user's")
    for other in folder.parent.iterdir():
        with contextlib.suppress(OSError), (other / "clients").open() as clients:
            if _try_lock(clients):
                _remove_folder(other)
    while True:
        with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
            folder.mkdir(mode=0o700, exist_ok=True)
            clients = (folder / "clients").open("a")
            fcntl.flock(clients, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(clients.fileno()), (folder / "clients").stat()):
                    return clients
            clients.close()
