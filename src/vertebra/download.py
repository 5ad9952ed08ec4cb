"""Files from the net: into a cache, through a temporary name, checked, retried from where they broke off."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

_CHUNK = 1 << 20


class DownloadError(OSError):
    """A file that could not be fetched whole; nothing is left under its name."""


def cache_folder() -> Path:
    """$VERTEBRA_CACHE, else $XDG_CACHE_HOME/vertebra, else ~/.cache/vertebra."""
    named = os.environ.get("VERTEBRA_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vertebra"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _append(url: str, part: Path, timeout: float) -> None:
    """Fetch the rest of `url` into `part`; starts over where the server does not resume."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        resumed = start and answer.status == 206
        expected = answer.headers.get("Content-Length")
        got = 0
        with part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(_CHUNK):
                got += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    if expected is not None and got != int(expected):
        raise ConnectionError(f"{got} of {expected} bytes came")


def fetch(url: str, sha256: str = "", folder: Path | None = None, retries: int = 3, timeout: float = 30.0) -> Path:
    """The cached file of `url`, fetched if it is not there; `sha256` may be the leading digits of the digest.

    Raises DownloadError after `retries` attempts (what came is kept under a temporary name and continued next time), or
    at once when the digest differs (the file is removed) or the server says that it has no such file.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url}: only http and https addresses are fetched")
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]", "_", Path(urllib.parse.urlsplit(url).path).name) or "file"
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{stem}"
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    problem: Exception | None = None
    for attempt in range(retries):
        try:
            _append(url, part, timeout)
            problem = None
            break
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is longer than the file: not of this file
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                raise DownloadError(f"{url}: the server answered {error.code} {error.reason}") from None
            problem = error
        except (OSError, ValueError, http.client.HTTPException) as error:  # the last: an answer that breaks off
            problem = error
        if attempt + 1 < retries:
            time.sleep(min(0.2 * 2**attempt, 5.0))
    if problem is not None:
        raise DownloadError(f"{url}: not fetched after {retries} attempts ({problem}); run again to continue") from None
    if sha256:
        digest = _digest(part)
        if not digest.startswith(sha256.lower()):
            part.unlink()
            raise DownloadError(f"{url}: sha256 is {digest[:16]}..., expected {sha256[:16]}...; the file was removed")
    os.replace(part, target)
    return target
