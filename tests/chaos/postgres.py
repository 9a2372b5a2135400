"""A PostgreSQL of one's own, which may be stopped, crashed, and made to wait at chosen places."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

from local_server import ROOT, Failure

from .processes import end_with_harness, until

# Where a transaction can be made to wait: triggers there take an advisory lock shared, and whoever holds it alone keeps
# everybody from going on.
GATES = {"claim": ("attempts", "insert"), "heartbeat": ("leases", "update"), "commit": ("nodes", "insert")}
GATE_FUNCTION = """
create function chaos_gate() returns trigger language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared(tg_argv[0]::bigint);
    return new;
end $$"""


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

    @contextlib.contextmanager
    def away(self, number):
        """Is not there for a while."""
        self.stop(number)
        try:
            yield
        finally:
            self.start()

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
