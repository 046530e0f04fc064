import subprocess
import tempfile
from pathlib import Path

from pytest_nsbox import Session
from pytest_nsbox.kernel.inode_flags import spread


def _says(*command: str | Path) -> str:
    return subprocess.check_output(list(map(str, command)), text=True)


def _kept_apart(directory: Path) -> bool:
    return "T" in _says("lsattr", "-d", directory).split()[0]


def test_what_is_written_is_spread_over_the_disk_where_the_filesystem_can() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as cache:
        kind = _says("findmnt", "-no", "FSTYPE", "-T", cache).strip()
        with Session(cache=cache) as session, session.container(memory="64M", network="none"):
            layers = Path(cache, "writable")
            if kind in ("overlay", "tmpfs"):  # no layers are kept there
                assert not any(layers.iterdir())
            else:
                assert _kept_apart(layers) == kind.startswith("ext")


def test_where_the_filesystem_cannot_nothing_is_said() -> None:
    spread("/proc/self")
