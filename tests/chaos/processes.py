"""A whole service of one's own, every process of which may be stopped, killed and started again.

PostgreSQL is reached over a unix socket, the store through a proxy that can do it harm. Everything lies in one folder and
is ended by its process id: in `close`, and by the kernel if the harness is killed.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from local_server import RELORA, Failure, LocalServer, parent_of_data  # noqa: E402

from .proxy import Proxy  # noqa: E402

LEASE_S = 3
TEXT = "".join(f"def function_{i}(value):\n    return value * {i} + {i % 7}\n\n" for i in range(4000))

# Where a transaction can be made to wait, by the number of the advisory lock that it waits for: the triggers below take it
# shared, and whoever holds it alone keeps everybody there.
GATES = {"claim": ("attempts", "insert"), "heartbeat": ("leases", "update"), "commit": ("nodes", "insert")}
GATE_FUNCTION = """
create function chaos_gate() returns trigger language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared(tg_argv[0]::bigint);
    return new;
end $$"""


def until(condition, timeout_s, what, pause_s=0.02):
    """Returns what the condition gives as soon as that is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(pause_s)
    raise Failure(f"{what}: not within {timeout_s} s")


def end_with_harness(number):
    """For a child: the kernel sends the signal when the harness is gone, however it went."""
    PR_SET_PDEATHSIG = 1

    def prepare():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)

    return prepare


class Postgres:
    """A private PostgreSQL. It remembers when each transaction was committed."""

    def __init__(self, folder, log_path):
        self.bin = pathlib.Path(subprocess.check_output([ROOT / "scripts" / "setup-postgres"], text=True).strip())
        self.data = folder / "postgres"
        self.socket_dir = pathlib.Path(tempfile.mkdtemp(prefix="relora-chaos-", dir="/tmp"))  # a socket's path is short
        self.log_path = log_path
        self.process = None
        # PostgreSQL refuses to run as root.
        self.owner = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        self.data.mkdir()
        if self.owner:
            for path in (self.data, self.socket_dir):
                shutil.chown(path, "postgres")

    @property
    def url(self):
        return f"postgres://relora@localhost/postgres?host={self.socket_dir}"

    def create(self):
        self._run("initdb", "-D", self.data, "-U", "relora", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self.start()

    def _run(self, program, *arguments):
        result = subprocess.run(
            [self.bin / program, *arguments], cwd=self.data, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, **self.owner,
        )
        if result.returncode != 0:
            raise Failure(f"{program} failed: {result.stdout}")

    def start(self):
        settings = ["listen_addresses=", f"unix_socket_directories={self.socket_dir}", "max_connections=200",
                    "track_commit_timestamp=on"]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.data, *(word for setting in settings for word in ("-c", setting))],
                cwd=self.data, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=end_with_harness(signal.SIGQUIT), **self.owner,
            )
        until(self._is_ready, 60, "PostgreSQL is ready")

    def _is_ready(self):
        if self.process.poll() is not None:
            raise Failure(f"PostgreSQL ended with {self.process.returncode}; see {self.log_path}")
        return self._psql("select 1").returncode == 0

    def stop(self, number=signal.SIGINT):
        """SIGINT disconnects everybody; SIGQUIT is a crash, from which the next start recovers."""
        if self.process is None:
            return
        self.process.send_signal(number)
        self.process.wait(60)
        self.process = None

    def close(self):
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.socket_dir, ignore_errors=True)

    def install_gates(self):
        """To be called once the schema is there."""
        self.execute(GATE_FUNCTION)
        for number, (name, (table, action)) in enumerate(GATES.items(), 1):
            self.execute(f"create trigger chaos_{name} before {action} on {table} "
                         f"for each row execute function chaos_gate({number})")

    def gate(self, name):
        """Keeps every transaction that comes to the place from going on, until it is opened."""
        return Gate(self, list(GATES).index(name) + 1)

    def terminate_connections(self):
        self.execute("select pg_terminate_backend(pid) from pg_stat_activity "
                     "where pid <> pg_backend_pid() and backend_type = 'client backend'")

    def query(self, sql):
        """Rows as dictionaries."""
        return json.loads(self.execute(f"select coalesce(json_agg(t), '[]') from ({sql}) t"))

    def value(self, sql):
        return next(iter(self.query(sql)[0].values()))

    def execute(self, sql):
        result = self._psql(sql)
        if result.returncode != 0:
            raise Failure(f"psql: {result.stderr.strip()}")
        return result.stdout

    def _psql(self, sql):
        return subprocess.run([*self.psql_command(), "-c", sql], text=True, capture_output=True)

    def psql_command(self):
        return [self.bin / "psql", "-h", self.socket_dir, "-U", "relora", "-d", "postgres", "-XAtq",
                "-v", "ON_ERROR_STOP=1"]


class Gate:
    """A closed gate. It opens in `open`, and when PostgreSQL or the harness goes."""

    def __init__(self, postgres, number):
        self.postgres, self.number = postgres, number
        self.session = subprocess.Popen(
            postgres.psql_command(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, preexec_fn=end_with_harness(signal.SIGKILL),
        )
        self.session.stdin.write(f"select pg_advisory_lock({number}); select 'closed';\n")
        self.session.stdin.flush()
        while self.session.stdout.readline().strip() != "closed":
            if self.session.poll() is not None:
                raise Failure("a gate could not be closed")

    def is_waited_at(self):
        waiting = f"select count(*) from pg_locks where locktype = 'advisory' and objid = {self.number} and not granted"
        return self.postgres.value(waiting) > 0

    def open(self):
        self.session.kill()
        self.session.wait()
        # Its backend may be asleep; ended from here it gives up the lock at once.
        with contextlib.suppress(Failure):
            self.postgres.execute(f"select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' "
                                  f"and objid = {self.number} and granted and mode = 'ExclusiveLock'")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open()


class Server(LocalServer):
    """`relora serve` with some settings. It may be killed and started again."""

    def __init__(self, folder, log_path, **settings):
        super().__init__(log_path, data_dir=folder)
        self.env |= {"RELORA_LOCAL_WORKER": "false", "RELORA_LEASE_S": str(LEASE_S)} | settings

    def kill(self):
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Worker:
    """A `relora worker` of a site, started at once."""

    def __init__(self, site, name, command=(), direct=False, **settings):
        self.name = name
        self.work_dir = site.folder / "work" / name
        self.log_path = site.logs / f"{name}.log"
        self.env = site.env | site.access(direct) | {
            "RELORA_WORKER_NAME": name, "RELORA_WORK_DIR": str(self.work_dir), "RELORA_LEASE_S": str(LEASE_S),
            "RELORA_LOG": "info",
        } | settings
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*command, RELORA, "worker"], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=end_with_harness(signal.SIGKILL),
            )
        self.pid = self.process.pid

    def is_alive(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """SIGTERM, and the exit code that follows."""
        self.process.terminate()
        return self.process.wait(60)

    def trainer_pid(self):
        """Its trainer, if one runs."""
        return next((pid for pid, line in processes_with(self.work_dir).items() if "relora-trainer" in line), None)

    def attempt_folder(self, job_id, lease_epoch):
        """Where the files of an attempt are, as long as they are."""
        return next(self.work_dir.glob(f"*/{job_id}-{lease_epoch}"), None)

    def log(self):
        return self.log_path.read_text(errors="replace")


class Site:
    """PostgreSQL, a store behind a proxy, an API server, tokens to train on, and workers as they are asked for."""

    def __init__(self, logs):
        self.logs = pathlib.Path(logs)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="relora-chaos-", dir=parent_of_data()))
        self.folder.chmod(0o755)  # as root the databases run as another user
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RELORA_", "S3_", "AWS_", "DATABASE_URL"))}
        self.env |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        self.workers = []
        self.references = {}
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self):
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.postgres = Postgres(self.folder, self.logs / "postgres.log")
        self.stack.callback(self.postgres.close)
        self.postgres.create()
        # The embedded store of a server that does nothing else.
        self.store = Server(self.folder / "store", self.logs / "store.log")
        self.stack.callback(self.store.close)
        self.store.start()
        self.store_access = json.loads((self.store.data_dir / "s3" / "access.json").read_text())
        self.objects = self.store.data_dir / "s3" / "objects" / "relora"
        self.proxy = Proxy(self.store_access["port"])
        self.stack.callback(self.proxy.close)
        self.proxy.start()
        self.server = Server(self.folder / "server", self.logs / "server.log", **self.access())
        self.stack.callback(self.server.kill)
        self.server.start()
        self.postgres.install_gates()
        self.tokenization = self._tokenize()

    def close(self):
        """Ends every process, whatever happened to it, and removes the folder."""
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        before = [signal.signal(number, signal.SIG_IGN) for number in signals]
        try:
            self.end_workers()
            self.stack.close()
        finally:
            left = processes_with(self.folder)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)
            for number, handler in zip(signals, before):
                signal.signal(number, handler)
        if left:
            raise Failure("left running, and killed: " + "; ".join(f"{pid} {line}" for pid, line in left.items()))

    def access(self, direct=False):
        """How a process reaches database and store; the store past the proxy if `direct`."""
        port = self.store_access["port"] if direct else self.proxy.port
        return {
            "DATABASE_URL": self.postgres.url,
            "S3_ENDPOINT": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": self.store_access["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": self.store_access["secret_access_key"],
        }

    def worker(self, name=None, **settings):
        worker = Worker(self, name or f"worker-{len(self.workers)}", **settings)
        self.workers.append(worker)
        return worker

    def end_workers(self):
        """Kills them and waits until their trainers, who notice, are gone."""
        for worker in self.workers:
            if worker.is_alive():
                worker.kill()
        folder = self.folder / "work"
        try:
            until(lambda: not processes_with(folder), 10, "the trainers of killed workers end")
        finally:
            for pid in processes_with(folder):
                os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def working(self, count=1, **settings):
        """Workers for a while. What is left of their work does not wait for others."""
        try:
            yield [self.worker(**settings) for _ in range(count)]
        finally:
            self.end_workers()

    def _tokenize(self):
        path = self.folder / "text.txt"
        path.write_text(TEXT)
        with self.working():
            return self.server.relora_json("dataset", "create", path, "--name", "text", "--vocab-size", 300)["tokenization"]


def processes_with(folder):
    """The command lines of all processes that name a folder, by process id; those that have ended do not count."""
    found = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if str(folder) in line:
            found[int(entry.name)] = line
    return found
