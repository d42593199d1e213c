"""A generation tells nobody: it writes only what it was asked for, opens no socket, and leaves no thread behind.

The command runs in a process with a home, a cache and a temporary folder that are empty before, without a network if
the system lets a user take it away. ONNX Runtime's telemetry, switched on, is seen by every one of these checks but
the one of sockets: it waits 9 s before it looks up its host, in a thread that is there at once.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.assembly.conductor import BuildResult
from ilf_trt.errors import MissingDependency
from ilf_trt.runtime.onnxruntime_import import SWITCH, import_onnxruntime

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "HOME": "home",
    "XDG_CACHE_HOME": "home/.cache",
    "XDG_CONFIG_HOME": "home/.config",
    "XDG_DATA_HOME": "home/.local/share",
    "XDG_STATE_HOME": "home/.local/state",
    "XDG_RUNTIME_DIR": "run",
    "TMPDIR": "tmp",
}
"""Where libraries put files that nobody asked for."""

TIMEOUT_S = 60
ALONE = ("unshare", "--map-root-user", "--net")

WATCHED = """
import json, os, sys, time

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
seen = {"network": [], "written": [], "started": []}

def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.")):
        seen["network"].append(f"{event} {arguments!r}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITES:
        seen["written"].append(os.path.realpath(os.fsdecode(arguments[0])))
    elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link"):
        seen["written"] += [os.path.realpath(each) for each in arguments if isinstance(each, (str, os.PathLike))]
    elif event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork"):
        seen["started"].append(f"{event} {arguments!r}")

sys.addaudithook(watch)
from ilf_trt.cli import main

code = main(sys.argv[2:])
report = seen | {"started": [*seen["started"]], "code": code, "ends": False}
report["threads"] = len(os.listdir("/proc/self/task"))
with open("/proc/self/net/dev") as devices:
    report["interfaces"] = sorted(line.split(":")[0].strip() for line in devices if ":" in line)
for number in os.listdir("/proc/self/fd"):
    if int(number) > 2 and "socket:" in os.path.realpath(f"/proc/self/fd/{number}"):
        seen["network"].append(f"descriptor {number} is a socket")
child = os.fork()
if not child:
    sys.exit(7)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end and not report["ends"]:
    ended, status = os.waitpid(child, os.WNOHANG)
    report["ends"] = bool(ended) and os.waitstatus_to_exitcode(status) == 7
    time.sleep(0.01)
if not report["ends"]:
    os.kill(child, 9)
    os.waitpid(child, 0)
sys.stderr.write(json.dumps(report))
sys.stderr.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Watched:
    """What one process did."""

    report: dict[str, Any]
    left: set[str]

    @property
    def traces(self) -> set[str]:
        """What the checks below would find fault with."""
        report = self.report
        found = {"files": self.left, "network": report["network"], "threads": report["threads"] > 1}
        return {name for name, traces in (found | {"a fork hangs": not report["ends"]}).items() if traces}


@cache
def without_network() -> tuple[str, ...]:
    """How to start a command without a network; nothing where the system does not let us."""
    if shutil.which(ALONE[0]) is None:
        return ()
    allowed = subprocess.run([*ALONE, "true"], capture_output=True, check=False, timeout=TIMEOUT_S).returncode == 0
    return ALONE if allowed else ()


def generate(bundle: Path, folder: Path, *, wait_s: float = 10, **environment: str) -> Watched:
    """A generation into `folder`/out, and a child that was forked after it."""
    places = {name: folder / place for name, place in FOLDERS.items()}
    for place in (*places.values(), folder / "out", folder / "cwd"):
        place.mkdir(parents=True, exist_ok=True)
    before = everything(folder)
    command = ("generate", str(bundle), "--labels", "1,2", "--threads", "1")
    outputs = ("-o", str(folder / "out" / "a.png"), "--latents-out", str(folder / "out" / "a.npy"))
    ran = subprocess.run(
        [*without_network(), sys.executable, "-B", "-c", WATCHED, str(wait_s), *command, *outputs],
        cwd=folder / "cwd",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        | {name: str(place) for name, place in places.items()}
        | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    left = {name for name in everything(folder) - before if not name.startswith("out/")}
    return Watched(json.loads(ran.stderr), left)


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def quiet(dit_build: BuildResult, tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, Path]:
    folder = tmp_path_factory.mktemp("quiet")
    return generate(dit_build.bundle.path, folder), folder


def test_a_generation_leaves_what_it_was_asked_for_and_nothing_else(quiet: tuple[Watched, Path]) -> None:
    watched, folder = quiet
    assert watched.report["code"] == 0
    assert {path.name for path in (folder / "out").iterdir()} == {"a.png", "a.npy"}
    assert watched.left == set()
    strays = [name for name in watched.report["written"] if not Path(name).is_relative_to(folder / "out")]
    assert set(strays) <= {"/dev/null"}
    assert len(watched.report["written"]) > len(strays)  # the hook sees them


def test_a_generation_opens_no_socket_and_needs_no_network(quiet: tuple[Watched, Path]) -> None:
    report = quiet[0].report
    assert report["network"] == []
    assert not without_network() or report["interfaces"] == ["lo"]


def test_a_generation_starts_no_process_and_leaves_no_thread(quiet: tuple[Watched, Path]) -> None:
    report = quiet[0].report
    assert (report["started"], report["threads"]) == ([], 1)


def test_a_child_that_is_forked_after_a_generation_ends(quiet: tuple[Watched, Path]) -> None:
    assert quiet[0].report["ends"]


def test_these_checks_see_the_telemetry_that_is_switched_on(dit_build: BuildResult, tmp_path: Path) -> None:
    """The environment decides, so this is also how a user allows it."""
    watched = generate(dit_build.bundle.path, tmp_path, wait_s=1, **{SWITCH: "0"})
    assert watched.report["code"] == 0
    assert {"files", "threads", "a fork hangs"} <= watched.traces


def test_the_switch_of_the_environment_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    switched: list[str] = []
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: switched.append("off"))
    import_onnxruntime()
    assert (os.environ[SWITCH], switched) == ("0", [])
    monkeypatch.delenv(SWITCH)
    import_onnxruntime()
    assert (os.environ[SWITCH], switched) == ("1", ["off"])


def test_without_onnx_runtime_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match="pip install onnxruntime-gpu"):
        import_onnxruntime("onnxruntime-gpu")
