"""C sources of kernels, compiled once per machine with the compiler that is there, and kept.

A machine without a compiler computes the same with torch's operations, slower, and says so once in the log. The binary
is made for this very processor, so its name carries a checksum of source (with the headers beside it), flags and
processor, and it is put where only this user writes: $XDG_CACHE_HOME/headrace, or ~/.cache/headrace.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS_MAX = 120


@cache
def native_library(source: Path, defines: tuple[str, ...], *, holds_interpreter: bool = False) -> ctypes.CDLL | None:
    """The library of a C source, compiled now if it never was on this machine; None, said in the log, if it cannot be.

    defines: as in ``-D``. holds_interpreter: calls keep Python's lock, for those that take microseconds: a thread that
    lets go of it may wait for milliseconds until it has it again. Takes about a second the first time, in any process
    of this user, and a millisecond later.
    """
    try:
        library = str(_compiled(source, defines))
        return ctypes.PyDLL(library) if holds_interpreter else ctypes.CDLL(library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("%s is not compiled, its kernel takes its slower form: %s", source.name, _reason(error))
        return None


def _compiled(source: Path, defines: tuple[str, ...]) -> Path:
    flags = (*_FLAGS, *(f"-D{define}" for define in defines))
    sources = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")), *_HEADERS)]
    content = b"\0".join([*sources, " ".join(flags).encode(), _processor().encode()])
    digest = hashlib.sha256(content).hexdigest()[:16]
    library = _folder() / f"{source.parent.name}-{digest}.so"
    if not library.is_file():
        _compile(source, flags, library)
    return library


def _compile(source: Path, flags: tuple[str, ...], library: Path) -> None:
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C compiler ({', '.join(_COMPILERS)}) is installed")
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Several processes may do this at once: each makes its own, and the last rename stays.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        built = ["-shared", "-fPIC", f"-I{Path(__file__).parent}", str(source), "-o", str(made), "-lm"]
        command = [compiler, *flags, *built]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS_MAX)
        made.replace(library)


def _folder() -> Path:
    """RuntimeError for a user without a home, as containers have them."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "headrace"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _reason(error: OSError | RuntimeError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} says: {error.stderr.strip()[-500:]}"
    return str(error)
