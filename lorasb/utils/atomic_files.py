"""Atomic writes of files and folders that survive a power failure; digests, a folder lock, and the cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def replacing(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """Provide a temporary file, and rename it over `path` if the block succeeds; failed writes raise an OSError."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the rename stays within a file system and is atomic
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(handle)
    return _taking_place(Path(name), target)


def replacing_folder(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """Provide a temporary folder, and replace `path` by it if the block succeeds; failed writes raise an OSError."""
    target = Path(os.path.realpath(path))  # follow a link to its folder
    target.parent.mkdir(parents=True, exist_ok=True)
    return _taking_place(Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")), target)


@contextmanager
def _taking_place(temporary: Path, target: Path) -> Iterator[Path]:
    """Yield a temporary file or folder, then replace the target by it; errors without a file name get the target's."""
    try:
        yield temporary
        if not (temporary.is_file() and temporary.stat().st_nlink > 1):  # a hard link keeps its file's mode
            set_usual_mode(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        _take_place(temporary, target)
        _sync(target.parent)
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:  # numpy's error has text alone
            raise OSError(f"{target} cannot be written: {error}") from error
        raise type(error)(error.errno, f"{target} cannot be written: {error.strerror}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def set_usual_mode(path: Path) -> None:
    """Give a file or folder the mode that the umask allows: tempfile's and safetensors' are for the owner alone."""
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    """The process's umask: read from /proc on Linux; elsewhere setting it is the only way to read it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("\nUmask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):
        found = os.umask(0o077)
        os.umask(found)
        return found


def _sync(path: Path) -> None:
    """Write a file's contents, or a folder's entries, to the disk: a rename alone does not survive a power failure."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that is writable but not readable
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # other errors: no fsync there, such as of folders
            raise
    finally:
        os.close(handle)


def _take_place(temporary: Path, target: Path) -> None:
    """Rename a file or folder to `target`; an existing folder is moved aside first, and back if that fails."""
    if temporary.is_file() or not target.is_dir():
        os.replace(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.former."))
    former = aside / target.name  # a new name: os.replace replaces only empty folders, and on Windows none
    try:
        os.replace(target, former)
        try:
            os.replace(temporary, target)
        except BaseException:
            os.replace(former, target)
            raise
        shutil.rmtree(former, ignore_errors=True)
    finally:
        with suppress(OSError):  # not empty if the former folder could not be put back
            aside.rmdir()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def refuse_unwritable(folder: Path) -> None:
    """Raise an OSError if no file can be written into a folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


LOCK = ".lock"


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder for this process by a file in it; raise a ValueError with the PID of a process that has it."""
    file = Path(folder, LOCK)
    made = not file.parent.exists()
    lock = _lock(file)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):  # the folder may be gone
                file.unlink(missing_ok=True)
                if made:
                    file.parent.rmdir()  # raises if it is not empty
            lock.close()


def _lock(file: Path) -> TextIO | None:
    """A locked file with this process's PID; None where the file system has no locks or is read-only."""
    while fcntl is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = open(file, "a+")  # noqa: SIM115  held until the block ends
        except (FileExistsError, NotADirectoryError):
            found = f"got {file.parent}, which is a file or inside one"
            raise ValueError(f"expected a folder to write into, {found}: take another --output") from None
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            if not isinstance(error, BlockingIOError):
                return None
            raise ValueError(
                f"{file.parent} is in use by PID {owner}: wait for it to end, or take another --output"
            ) from None
        # Another process may have removed the file between the two calls: a lock on a removed file protects nothing.
        if file.exists() and os.fstat(lock.fileno()).st_ino == file.stat().st_ino:
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return lock
        lock.close()
    return None


CACHE_VARIABLE = "LORASB_CACHE"


def cache_dir() -> Path:
    """$LORASB_CACHE, or ~/.cache/lorasb if it is not set; read in every call."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/lorasb").expanduser()
