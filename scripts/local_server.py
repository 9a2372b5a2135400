"""A `relora serve` of one's own: on a free port, with a data folder that goes when it goes, unless one is named.

Used by scripts/demo, scripts/bench-service, experiments/ and the tests. Everything that it starts is stopped in
`close`, and what then still runs is an error.
"""

import ctypes
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BIN = pathlib.Path(os.environ.get("RELORA_BIN_DIR", TARGET / "release")).resolve()
RELORA = BIN / "relora"

STOP_S = 60
SET_BY_US = ("RELORA_", "S3_", "AWS_", "DATABASE_URL")


class Failure(Exception):
    """What went wrong, in words for the person who runs the script."""


class LocalServer:
    """The server, the client that talks to it, and the folder of both."""

    def __init__(self, log_path, data_dir=None):
        """Without `data_dir` everything is new and is removed in `close`; a folder that is named stays."""
        self.keeps_data = data_dir is not None
        if self.keeps_data:
            self.data_dir = pathlib.Path(data_dir).resolve()
            self.data_dir.mkdir(parents=True, exist_ok=True)
        else:
            self.data_dir = pathlib.Path(tempfile.mkdtemp(prefix="relora-demo-", dir=parent_of_data()))
            self.data_dir.chmod(0o755)  # as root the database runs as another user
        self.log_path = log_path
        self.process = None
        # Settings of the caller's own server must not leak into this one; the cache folder is no such setting.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(SET_BY_US)}
        self.env |= {"RELORA_DATA_DIR": str(self.data_dir), "RELORA_BIND": "127.0.0.1:0"}
        # A proxy for the rest of the world does not know this server.
        self.env |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(self):
        """Starts `relora serve`, waits until it is ready, and returns how long that took, in seconds."""
        started = time.monotonic()
        self.old_client_file = self._client_file_version()
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [RELORA, "serve"], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                # Ctrl-C reaches this script alone, which then stops the server in order.
                start_new_session=True, preexec_fn=_end_with_parent,
            )
        while time.monotonic() - started < 60:
            if self.process.poll() is not None:
                raise Failure(f"relora serve ended with exit code {self.process.returncode} before it was ready")
            if self._is_ready():
                return time.monotonic() - started
            time.sleep(0.02)
        raise Failure("relora serve was not ready after 60 s")

    def _is_ready(self):
        # An earlier server's port may be another's by now.
        if self._client_file_version() == self.old_client_file:
            return False
        try:
            return self.get("/readyz")["ready"]
        except (OSError, ValueError, KeyError):
            return False

    def _client_file_version(self):
        """Tells a client.json from the one of an earlier start; None without one."""
        try:
            status = (self.data_dir / "client.json").stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def stop(self):
        """Asks the server to end, and waits until it has."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Failure(f"relora serve did not stop within {STOP_S} s and was killed")
        if code != 0:
            raise Failure(f"relora serve ended with exit code {code}")

    def close(self):
        """Stops everything and removes the data folder, unless it is to stay."""
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        before = [signal.signal(number, signal.SIG_IGN) for number in signals]
        try:
            self.stop()
        finally:
            self._end_left_over()
            if not self.keeps_data:
                shutil.rmtree(self.data_dir, ignore_errors=True)
            for number, handler in zip(signals, before):
                signal.signal(number, handler)

    def _end_left_over(self):
        """Nothing that names the data folder may still run: the database, a trainer."""
        deadline = time.monotonic() + 5
        while (left := self._left_over()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        if left:
            raise Failure("left running, and killed: " + "; ".join(f"{pid} {name}" for pid, name in left.items()))

    def _left_over(self):
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.data_dir) in arguments:
                found[int(folder.name)] = arguments.strip()
        return found

    def peak_resident_bytes(self):
        """The most memory that the server itself ever had resident."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))

    def request(self, path, headers=None, body=None):
        """An open answer of the API; a body makes it a POST."""
        client = json.loads((self.data_dir / "client.json").read_text())
        headers = {"Authorization": f"Bearer {client['api_key']}"} | (headers or {})
        return self.opener.open(urllib.request.Request(client["url"] + path, body, headers), timeout=60)

    def get(self, path):
        """A JSON answer of the API."""
        with self.request(path) as answer:
            return json.load(answer)

    def post(self, path, document=None):
        """Posts JSON and returns the JSON answer; what the API refuses is told with its reasons."""
        body = json.dumps(document).encode() if document is not None else b""
        try:
            with self.request(path, {"Content-Type": "application/json"}, body) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            reasons = error.read().decode(errors="replace")
            raise Failure(f"POST {path} was refused with status {error.code}: {reasons}") from None

    def pages(self, path, **query):
        """Every item of a list, page by page."""
        while True:
            page = self.get(f"{path}?{urllib.parse.urlencode(query)}")
            yield from page["data"]
            if page["next_cursor"] is None:
                return
            query["cursor"] = page["next_cursor"]

    def relora(self, *arguments):
        """Runs a client command with the terminal; returns its exit code."""
        return subprocess.run([RELORA, *map(str, arguments)], env=self.env).returncode

    def relora_json(self, *arguments):
        """Runs a client command and returns the document that it prints."""
        result = subprocess.run([RELORA, *map(str, arguments), "--json"], env=self.env, stdout=subprocess.PIPE)
        if result.returncode != 0:
            raise Failure(f"relora {' '.join(map(str, arguments))} failed; see above")
        return json.loads(result.stdout)

    def events(self, job_id):
        """Every event of a job."""
        events, after = [], 0
        while page := self.get(f"/v1/jobs/{job_id}/events?after={after}&limit=500")["data"]:
            events += page
            after = page[-1]["seq"]
        return events

    def print_log_end(self, num_lines=40):
        if not self.log_path.exists():
            return
        lines = self.log_path.read_text(errors="replace").splitlines()[-num_lines:]
        print(f"--- the end of {self.log_path}", *lines, "---", sep="\n", flush=True)


def parent_of_data():
    """target/, or /tmp where root's database user could not reach target/."""
    target = ROOT / "target"
    target.mkdir(exist_ok=True)
    folders = [target, *target.parents]
    if os.geteuid() == 0 and not all(folder.stat().st_mode & stat.S_IXOTH for folder in folders):
        return "/tmp"
    return target


def _end_with_parent():
    """Even a killed script leaves no server behind: the kernel sends SIGTERM when the parent is gone."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def raise_on_signals():
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that `finally` runs."""
    def unwind(number, _frame):
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, unwind)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup asked for it
        signal.signal(signal.SIGHUP, unwind)
