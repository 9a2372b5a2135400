"""A whole service of one's own, every process of which may be stopped, killed and started again.

PostgreSQL is reached over a unix socket, the store through a proxy that can do it harm. Everything lies in one folder
and is ended by its process id: in `close`, and by the kernel if the harness is killed.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import tempfile

from local_server import Failure, parent_of_data

from .postgres import Postgres
from .processes import Server, Worker, processes_with, until
from .proxy import Proxy

TEXT = "".join(f"def function_{i}(value):\n    return value * {i} + {i % 7}\n\n" for i in range(4000))


class Site:
    """PostgreSQL, a store behind a proxy, an API server, tokens to train on, and workers as they are asked for."""

    def __init__(self, logs, lease_s=3):
        self.logs, self.lease_s = pathlib.Path(logs), lease_s
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
        settings = {"RELORA_LEASE_S": str(self.lease_s)} | self.access()
        self.server = Server(self.folder / "server", self.logs / "server.log", **settings)
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
        """Workers for a while. When that is over all workers end, and what they have not done is given up."""
        try:
            yield [self.worker(**settings) for _ in range(count)]
        finally:
            self.end_workers()
            self.postgres.execute("with given_up as (delete from leases) update work_items set state = 'done' "
                                  "where state <> 'done'")

    def _tokenize(self):
        path = self.folder / "text.txt"
        path.write_text(TEXT)
        with self.working():
            created = self.server.relora_json("dataset", "create", path, "--name", "text", "--vocab-size", 300)
        return created["tokenization"]
