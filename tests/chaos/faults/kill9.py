"""`kill -9` of trainer, worker or server, at a random moment of a phase that is waited for.

| phase | the kill comes |
|---|---|
| claim | while the claim's transaction waits at a gate in the database |
| staging | while the worker asks the store for the tokens |
| step | up to a second and a half after an attempt's first reported step |
| merge | when the trainer has logged the merge, before anything of it is on disk |
| save | while a node's folder has its temporary name; what is found there afterwards proves it |
| upload | while the store is being sent a file of a node; the request is dropped, or reaches the store after the kill |
| commit | while the transaction that makes a node visible waits at a gate |
"""

import itertools
import os
import signal
import time

from local_server import Failure

from .. import jobs
from ..processes import until
from ..rows import judged

EARLY = ("claim", "staging")
LATE = ("step", "merge", "save", "upload", "commit")
PHASES = EARLY + LATE
MIN_STATES = 10
MIN_PER_PHASE = 5
#: A phase that does not come again in a job is waited for in another one.
MAX_TRIES = 5


class Missed(Exception):
    """The phase does not come any more in this job."""


def run(site, runs, random, min_states=MIN_STATES, slack_s=0.0):
    """`slack_s` is what a busy machine may take longer than the undisturbed run did."""
    spec = jobs.long_enough(site, jobs.tiny(site), (min_states + 1) * jobs.STATE_EVERY_S)
    campaign = Campaign(site, spec, random, min_states)
    planned = plan(runs, random)
    for phase, following in zip(planned, [*planned[1:], None]):
        campaign.kill_in(phase, following)
    return campaign.row(runs, slack_s)


def plan(runs, random):
    """The phases in an order in which they come: claim and staging follow upon another kill, or begin a job."""
    late = [LATE[i % len(LATE)] for i in range(runs - runs * len(EARLY) // len(PHASES))]
    early = [EARLY[i % len(EARLY)] for i in range(runs - len(late))]
    random.shuffle(late)
    random.shuffle(early)
    planned = []
    for i, phase in enumerate(late):
        planned.append(phase)
        planned += early[i * len(early) // len(late):(i + 1) * len(early) // len(late)]
    return planned


class Campaign:
    """One job after another, and the kills that they go through."""

    def __init__(self, site, spec, random, min_states):
        self.site, self.spec, self.random, self.min_states = site, spec, random, min_states
        self.reference = jobs.reference(site, spec)
        self.kills = dict.fromkeys(PHASES, 0)
        self.victims = {}
        self.job_ids = []
        self.delays = {}  # what this harness held up, by job and lease epoch: (ended_at_s, delay_s)
        self.worker = None
        self.is_orphaned = False  # the job's worker is gone, and nobody has taken it up again
        self.victim = None  # None: any that fits the phase

    @property
    def job_id(self):
        return self.job_ids[-1]

    def kill_in(self, phase, following):
        # Before claim or staging it is a worker's turn: its lease leaves time to prepare for who takes the job up.
        self.victim = "worker" if following in EARLY else None
        for _ in range(MAX_TRIES):
            try:
                self._ensure_worker()
                if getattr(self, f"_{phase}")():
                    self.kills[phase] += 1
                    return
                self.kills["step"] += 1  # it came too late, and met the steps after the phase
            except Missed:
                self._finish_job()
        raise Failure(f"{MAX_TRIES} jobs went by without a kill in the phase {phase}")

    # The phases: each returns whether the kill met it.

    def _claim(self):
        """The gate is closed before there is anything to claim."""
        self._finish_unless_orphaned()
        with self.site.postgres.gate("claim") as gate:
            self._submit_unless_orphaned()
            until(gate.is_waited_at, 60, "a worker claims")
            self._kill(("worker", "worker", "server"))
        return True

    def _staging(self):
        self._finish_unless_orphaned()
        hold = self.site.proxy.hold_next(lambda request: request.method == "GET" and request.key.startswith("t/"))
        try:
            self._submit_unless_orphaned()
            if not hold.caught.wait(60):
                raise Failure("no worker stages")
            time.sleep(self.random.uniform(0, 0.1))
            self._kill_in_attempt(("worker", "worker", "server"))
        finally:
            hold.release(drop=self.random.random() < 0.5)
            self.site.proxy.hold = None
        return True

    def _step(self):
        self._ensure_running()
        time.sleep(self.random.uniform(0, 1.5))
        return self._kill_late()

    def _merge(self):
        self._ensure_running()
        log = self._attempt_folder() / "trainer.log"
        seen = merges_in(log)
        self._wait_in_attempt(lambda: merges_in(log) > seen, pause_s=0.002)
        return self._kill_late()

    def _save(self):
        self._ensure_running()
        out = self._attempt_folder() / "out"
        time.sleep(self.random.uniform(0, 1))
        self._wait_in_attempt(lambda: unfinished(out), pause_s=0.001)
        pid = self.worker.trainer_pid()
        if pid is None:
            raise Missed
        # Frozen first: the kill meets what is seen.
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            raise Missed from None
        met = bool(unfinished(out))
        self._kill_late()
        with_trainer(pid, signal.SIGCONT)
        return met

    def _upload(self):
        self._ensure_running()
        time.sleep(self.random.uniform(0, 1))
        hold = self.site.proxy.hold_next(lambda request: request.is_write and self._is_of_node(request.key))
        started = time.monotonic()
        try:
            self._wait_in_attempt(hold.caught.is_set)
            time.sleep(self.random.uniform(0, 0.2))
            self._kill_late(time.monotonic() - started)
        finally:
            hold.release(drop=self.random.random() < 0.5)
            self.site.proxy.hold = None
        return True

    def _commit(self):
        self._ensure_running()
        time.sleep(self.random.uniform(0, 1))
        started = time.monotonic()
        with self.site.postgres.gate("commit") as gate:
            self._wait_in_attempt(gate.is_waited_at)
            time.sleep(self.random.uniform(0, 0.1))
            self._kill_late(time.monotonic() - started)
        return True

    def _is_of_node(self, key):
        return key.startswith(f"j/{self.job_id}/") and not key.endswith("trainer.log")

    # What leads to a phase.

    def _finish_unless_orphaned(self):
        if not self.is_orphaned:
            self._finish_job()

    def _submit_unless_orphaned(self):
        if not self.is_orphaned:
            self._submit()

    def _submit(self):
        self.job_ids.append(jobs.submit(self.site, self.spec))

    def _ensure_running(self):
        self.is_orphaned = False
        if not self.job_ids or jobs.look(self.site, self.job_id)["state"] in jobs.FINAL:
            self._submit()

        def steps():
            job = jobs.look(self.site, self.job_id)
            if job["state"] in jobs.FINAL:
                raise Missed
            reported = self.site.postgres.query(
                f"select lease_epoch from job_progress where job_id = '{self.job_id}'")
            return reported and reported[0]["lease_epoch"] == jobs.lease_epoch(self.site, self.job_id)

        until(steps, 120, f"{self.job_id} steps")

    def _wait_in_attempt(self, condition, pause_s=0.01):
        """Misses the phase where the attempt ends first."""
        looked = time.monotonic()
        while not condition():
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                if jobs.look(self.site, self.job_id)["state"] != "running" or self.worker.trainer_pid() is None:
                    raise Missed
            time.sleep(pause_s)

    def _attempt_folder(self):
        folder = self.worker.attempt_folder(self.job_id, jobs.lease_epoch(self.site, self.job_id))
        if folder is None:
            raise Missed
        return folder

    def _finish_job(self):
        if self.job_ids:
            self._ensure_worker()
            jobs.wait_for_end(self.site, self.job_id)

    def _ensure_worker(self):
        if self.worker is None or not self.worker.is_alive():
            self.worker = self.site.worker()

    # The kill.

    def _kill_late(self, held_s=0.0):
        pid = self.worker.trainer_pid()
        if pid is None:
            raise Missed
        self._kill_in_attempt(("trainer", "trainer", "worker", "worker", "server"), pid, held_s)
        return True

    def _kill_in_attempt(self, candidates, trainer_pid=None, held_s=0.0):
        """And what was held up at this attempt's expense. In the claim phase there is none yet that could lose steps."""
        delays = self.delays.setdefault((self.job_id, jobs.lease_epoch(self.site, self.job_id)), [])
        delays.append((time.monotonic(), held_s))
        away_s = self._kill(candidates, trainer_pid)
        if away_s > 0:
            delays.append((time.monotonic(), away_s))

    def _kill(self, candidates, trainer_pid=None):
        """Returns how long the server was away."""
        victim = self.victim or self.random.choice(candidates)
        self.victims[victim] = self.victims.get(victim, 0) + 1
        killed_at_s = time.monotonic()
        match victim:
            case "trainer":
                with_trainer(trainer_pid, signal.SIGKILL)
            case "worker":
                self.worker.kill()
                self.worker = self.site.worker()
                self.is_orphaned = True
            case "server":
                self.site.server.kill()
                self.site.server.start()
                return time.monotonic() - killed_at_s
        return 0.0

    # What must have held.

    def row(self, runs, slack_s):
        self._finish_job()
        self.site.end_workers()
        problems = [problem for job_id in self.job_ids
                    for problem in jobs.problems_of(self.site, job_id, self.reference)]
        repeats = [repeat for job_id in self.job_ids for repeat in self._repeats(job_id)]
        for job_id in self.job_ids:
            starts = [attempt["start_step"] for attempt in jobs.attempts(self.site, job_id)]
            if starts != sorted(starts):
                problems.append(f"{job_id}: attempts began at steps {starts}; none may begin behind an earlier one")
        for job_id, repeated_steps, repeated_s, allowed_s in repeats:
            if repeated_s > allowed_s + slack_s:
                problems.append(f"{job_id}: {repeated_steps} steps of {repeated_s:.2f} s were repeated, "
                                f"and {allowed_s:.2f} s are allowed")
        if len(self.reference.states) < self.min_states:
            problems.append(f"the job has {len(self.reference.states)} states, and {self.min_states} are wanted")
        few = [phase for phase, count in self.kills.items() if count < MIN_PER_PHASE]
        if few and runs >= MIN_PER_PHASE * len(PHASES):
            problems.append(f"fewer than {MIN_PER_PHASE} kills in {', '.join(few)}")
        steps = sorted(repeat[1] for repeat in repeats) or [0]
        slowest = max((repeat[2] for repeat in repeats), default=0.0)
        detail = (
            f"{', '.join(f'{phase} {count}' for phase, count in self.kills.items())}; "
            f"{', '.join(f'{victim} {count}' for victim, count in self.victims.items())}; "
            f"{len(self.job_ids)} jobs with {len(self.reference.states)} states undisturbed; "
            f"steps repeated: median {steps[len(steps) // 2]}, most {steps[-1]} ({slowest:.2f} s of training)"
        )
        return judged("kill9", sum(self.kills.values()), problems, detail, kills=self.kills, victims=self.victims,
                      jobs=len(self.job_ids), repeated_steps=steps, longest_upload_s=round(self.reference.upload_s, 3))

    def _repeats(self, job_id):
        """Of every attempt after the first, what the kill before it cost: how many steps of the attempt that was killed
        are done again, how long those had taken, and how long they may."""
        rows = self.site.postgres.query(
            f"select lease_epoch, step, value from job_metrics where job_id = '{job_id}' and name = 'tokens_per_s'")
        for killed, attempt in itertools.pairwise(jobs.attempts(self.site, job_id)):
            again = [row["value"] for row in rows
                     if row["lease_epoch"] == killed["lease_epoch"] and row["step"] > attempt["start_step"]]
            repeated_s = sum(jobs.NUM_SEQS * jobs.SEQUENCE_LENGTH / value for value in again)
            delays = self.delays.get((job_id, killed["lease_epoch"]), [])
            yield job_id, len(again), repeated_s, self._allowed_s(delays)

    def _allowed_s(self, delays):
        """A state's interval, its upload, and what this harness held up meanwhile: requests, and the server's answers by
        killing it."""
        allowed_s = jobs.STATE_EVERY_S + self.reference.upload_s
        for ended_at_s, delay_s in reversed(delays):
            if ended_at_s >= delays[-1][0] - allowed_s:
                allowed_s += delay_s
        return allowed_s


def merges_in(log):
    try:
        return log.read_text(errors="replace").count(": restart step=")
    except FileNotFoundError:
        raise Missed from None


def unfinished(out):
    """Folders of nodes that still have their temporary names."""
    return [*out.glob("*/.*.tmp")]


def with_trainer(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
