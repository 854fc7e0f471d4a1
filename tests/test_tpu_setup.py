"""`tpu_setup.sh` with stand-ins: gcloud, uv and pip on PATH, metadata on loopback.

The stand-in for gcloud runs what it is told to on "workers": directories, each with a
metadata server of its own. Everything else, tar and git and curl, is real.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = Path(__file__).parents[1] / "tpu_setup.sh"
README = SCRIPT.with_name("README.md")
TOOLS = (
    "bash", "cat", "cp", "curl", "dirname", "env", "git", "grep", "gzip",
    "mkdir", "mktemp", "paste", "rm", "sed", "sort", "tar", "tee", "tr",
)  # fmt: skip

UV = """#!/usr/bin/env bash
echo "uv $*" >>"$CALLS"
case $1 in
  venv)
    [ -z "${NO_PYTHON:-}" ] || { echo "no download" >&2; exit 2; }
    mkdir -p .venv/bin && cp "$STANDINS/venv-python" .venv/bin/python
    ;;
  pip)
    [ "${WORKER:-}" != "${BROKEN_WORKER:-none}" ] || { echo "disk full" >&2; exit 2; }
    ;;
esac
"""
VENV_PYTHON = """#!/usr/bin/env bash
[ "$1" = -m ] || exit 0
echo "python $*" >>"$CALLS"
[ -z "${NO_TPU:-}" ] || { echo "device_check: error: No tpu is visible." >&2; exit 1; }
echo "16 devices"
"""
PYTHON3 = """#!/usr/bin/env bash
echo "python3 $*" >>"$CALLS"
[ -z "${NO_PIP:-}" ] || { echo "No module named pip" >&2; exit 1; }
mkdir -p .uv/bin && cp "$STANDINS/uv" .uv/bin/uv
"""
GCLOUD = """#!/usr/bin/env bash
echo "gcloud $*" >>"$CALLS"
workers=("$PWD_OF_WORKERS"/*)
case $4 in
  describe)
    [ "$5" = pod ] || { echo "ERROR: NOT_FOUND: $5" >&2; exit 1; }
    echo "${STATE:-READY}"
    ;;
  scp)
    for home in "${workers[@]}"; do cp "$5" "$home/${6#pod:}"; done
    ;;
  ssh)
    status=0
    for argument; do
      case $argument in --command=*) command=${argument#--command=} ;; esac
    done
    for home in "${workers[@]}"; do
      worker=${home##*/}
      export WORKER=$worker
      GCE_METADATA_HOST=$(cat "$home/metadata") && export GCE_METADATA_HOST
      (cd "$home" && bash -c "$command") || {
        status=$?
        [ ${#workers[@]} -eq 1 ] ||
          echo "##### Command execution on worker $worker failed with" \\
            "exit status $status. Continuing." >&2
      }
    done
    exit $status
    ;;
esac
"""


class Bench(NamedTuple):
    """A checkout and what it runs among."""

    checkout: Path
    workers: Path
    environment: dict[str, str]
    calls: Path

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs the script; what it calls is in `calls` afterwards, and only that."""
        self.calls.write_text("")
        return subprocess.run(
            ("bash", str(self.checkout / "tpu_setup.sh"), *arguments),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def called(self, what: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if what in line]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    tools, standins = tmp_path / "tools", tmp_path / "standins"
    tools.mkdir()
    standins.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"needs {tool}")
        (tools / tool).symlink_to(found)
    for place, name, text in (
        (standins, "uv", UV),
        (standins, "venv-python", VENV_PYTHON),
        (tools, "python3", PYTHON3),
        (tools, "gcloud", GCLOUD),
    ):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(SCRIPT, checkout)
    calls = tmp_path / "calls"
    environment = {
        "PATH": str(tools),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "CALLS": str(calls),
        "STANDINS": str(standins),
        "PWD_OF_WORKERS": str(tmp_path / "workers"),
    }
    return Bench(checkout, tmp_path / "workers", environment, calls)


@contextlib.contextmanager
def metadata_server(attributes: dict[str, str]) -> Iterator[str]:
    """Answers for attributes as Google's does, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            before, _, name = self.path.partition("/instance/attributes/")
            known = before == "/computeMetadata/v1" and name in attributes
            asked = self.headers.get("Metadata-Flavor") == "Google"
            self.send_response(200 if known and asked else 404 if asked else 403)
            self.end_headers()
            if known and asked:
                self.wfile.write(attributes[name].encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def attributes(worker: int, num_workers: int) -> dict[str, str]:
    return {
        "accelerator-type": f"v5litepod-{4 * num_workers}",
        "agent-worker-number": str(worker),
        "worker-network-endpoints": ",".join(
            f"unknown:unknown:10.0.0.{number}" for number in range(num_workers)
        ),
    }


@pytest.fixture
def worker() -> Iterator[str]:
    """The metadata server of a TPU VM that is no pod's."""
    with metadata_server(attributes(0, 1)) as host:
        yield host


@pytest.fixture
def pod(bench: Bench) -> Iterator[Bench]:
    """Four workers, and a checkout under git."""
    git = ("git", "-C", str(bench.checkout))
    (bench.checkout / ".gitignore").write_text(".venv/\n/runs/\n")
    (bench.checkout / "gone.py").write_text("")
    for arguments in (("init", "-q"), ("add", "-A")):
        subprocess.run((*git, *arguments), check=True)
    (bench.checkout / "gone.py").unlink()
    (bench.checkout / "my own.py").write_text("untracked")
    (bench.checkout / "runs").mkdir()
    (bench.checkout / "runs" / "large").write_text("ignored")
    with contextlib.ExitStack() as stack:
        for number in range(4):
            home = bench.workers / str(number)
            home.mkdir(parents=True)
            host = stack.enter_context(metadata_server(attributes(number, 4)))
            (home / "metadata").write_text(host)
        yield bench


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    """The script failed and its last words are one sentence that has these parts."""
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("tpu_setup: error: "), done.stderr
    assert all(part in last for part in parts), last


# -- On a TPU VM -------------------------------------------------------------------


def test_a_bare_tpu_vm_gets_uv_a_python_dpojax_and_a_check(bench: Bench, worker: str):
    done = bench.run(GCE_METADATA_HOST=worker)
    assert done.returncode == 0, done.stderr
    assert [call.split(" --")[0] for call in bench.called("")] == [
        "python3 -m pip install",
        "uv venv",
        "uv pip install",
        "python -m dpojax.device_check",
    ]
    assert bench.called("uv pip")[0].endswith("--editable .[tpu]")
    assert bench.called("device_check")[0].endswith("--platform tpu --num-processes 1")
    assert "worker 0: 16 devices\n" in done.stdout
    assert ".venv/bin/dpojax train" in done.stdout.splitlines()[-1]


def test_a_second_run_makes_nothing_anew(bench: Bench, worker: str):
    bench.run(GCE_METADATA_HOST=worker)
    before = files(bench.checkout)
    done = bench.run(GCE_METADATA_HOST=worker)
    assert done.returncode == 0 and files(bench.checkout) == before
    assert not bench.called("python3") and not bench.called("uv venv")


def test_a_venv_that_does_not_run_is_made_anew(bench: Bench, worker: str):
    (bench.checkout / ".venv" / "bin").mkdir(parents=True)
    (bench.checkout / ".venv" / "half").write_text("")
    assert bench.run("install", GCE_METADATA_HOST=worker).returncode == 0
    assert not (bench.checkout / ".venv" / "half").exists()


def test_a_machine_without_metadata_is_no_tpu_vm(bench: Bench):
    refused(bench.run(GCE_METADATA_HOST="127.0.0.1:9"), "no Cloud TPU VM", "--name")
    assert not bench.called("")


def test_a_vm_without_a_tpu_is_told_so(bench: Bench):
    with metadata_server({}) as host:
        refused(bench.run(GCE_METADATA_HOST=host), "This VM has no TPU")


@pytest.mark.parametrize(
    ("broken", "part"),
    [
        ("NO_PIP", "apt-get install python3-pip"),
        ("NO_PYTHON", "install python3.12"),
        ("NO_TPU", "The check of the devices failed"),
    ],
)
def test_what_fails_on_a_worker_is_named(
    bench: Bench, worker: str, broken: str, part: str
):
    refused(bench.run(GCE_METADATA_HOST=worker, **{broken: "1"}), "worker 0: ", part)


def test_a_check_before_the_installation_is_refused(bench: Bench, worker: str):
    refused(bench.run("check", GCE_METADATA_HOST=worker), "./tpu_setup.sh install")


# -- From another machine ----------------------------------------------------------


def test_a_pod_is_set_up_worker_by_worker(pod: Bench):
    done = pod.run("--name", "pod", "--zone", "us-west4-a", "--project", "mine")
    assert done.returncode == 0, done.stderr
    calls = pod.called("gcloud")
    assert [call.split()[4] for call in calls] == ["describe", "scp", "ssh", "ssh"]
    assert all("--zone=us-west4-a --project=mine" in call for call in calls)
    for number in range(4):
        sent = files(pod.workers / str(number) / "dpojax")
        assert {"my own.py", "tpu_setup.sh"} <= sent.keys()
        assert not {"runs/large", "gone.py"} & sent.keys()
        assert f"worker {number}: 16 devices" in done.stdout
    checks = pod.called("device_check")
    assert len(checks) == 4 and all(call.endswith("4") for call in checks)
    start = done.stdout.splitlines()[-1]
    assert "ssh pod --zone=us-west4-a --project=mine --worker=all" in start
    assert "--distributed auto" in start


def test_a_worker_that_fails_is_named_and_no_other_waits_for_it(pod: Bench):
    done = pod.run("--name", "pod", BROKEN_WORKER="2")
    refused(done, "Worker 2 of 'pod' failed")
    assert "disk full" in done.stdout and not pod.called("device_check")
    again = pod.run("--name", "pod")
    assert again.returncode == 0 and len(pod.called("uv venv")) == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "parts"),
    [
        (("--name", "other"), {}, ("no TPU VM 'other'",)),
        (("--name", "pod"), {"STATE": "CREATING"}, ("'pod' is CREATING", "READY")),
        (("--name",), {}, ("--name needs a value",)),
        (("--zone", "us-west4-a"), {}, ("--zone", "give --name")),
        (("instal",), {}, ("no argument 'instal'", "--help")),
        (("install", "check"), {}, ("neither for both",)),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_copied(
    pod: Bench, arguments: tuple, environment: dict, parts: tuple
):
    refused(pod.run(*arguments, **environment), *parts)
    assert not pod.called("scp") and not pod.called("ssh")


def test_without_gcloud_the_way_on_is_told(pod: Bench):
    Path(pod.environment["PATH"], "gcloud").unlink()
    refused(pod.run("--name", "pod"), "gcloud is missing", "on the TPU VM itself")


def test_what_is_no_git_checkout_is_not_copied(pod: Bench):
    shutil.rmtree(pod.checkout / ".git")
    refused(pod.run("--name", "pod"), "is no git checkout")
    assert not pod.called("scp")


def test_help_is_the_head_of_the_script(bench: Bench):
    said = bench.run("--help").stdout
    assert said.startswith("Takes a bare") and said.endswith("bash is 3.2.\n")


def test_shellcheck_finds_nothing_in_the_script_and_in_what_the_readme_shows():
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("needs shellcheck, of the dev extra")
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert any("tpu_setup.sh" in block for block in blocks)
    for text in (SCRIPT.read_text("utf-8"), *blocks):
        done = subprocess.run(
            (found, "--shell=bash", "-"), input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
