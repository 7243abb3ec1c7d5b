"""The arena's command: every (teacher, arm, seed) is a job that leaves one JSON; started again, it goes on with what is
missing.

OUT/results/TEACHER/ARM/SEED.json     what was measured, or why it failed, with fingerprints of what it was made from
OUT/students/TEACHER/ARM/SEED/        the student, so that it is judged anew without training, and arms that start from it find it
OUT/logs/TEACHER-ARM-SEED.log         warnings and tracebacks
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from xlstm_arena import data
from xlstm_arena.arms import TEACHER, Arm
from xlstm_hybrid.checkpoint.files import FORMAT_VERSION, owner, read_object, write_json
from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError
from xlstm_hybrid.planning.cache_size import cache_bytes

RESULT_BYTES = 2**26
POLL = 0.2  # seconds between two looks at the workers
DONE, FAILED, STALE, MISSING = "done", "failed", "stale", "not run"
TEACHER_ARM = Arm(TEACHER, about="The teacher itself.", tier=1, stages=[])


@dataclass(frozen=True)
class Job:
    """One arm on one teacher with one seed, below the run directory `out`."""

    teacher: str
    arm: str
    seed: int
    out: Path

    def __str__(self):
        return f"{self.teacher}/{self.arm}/{self.seed}"

    @property
    def result(self):
        return self.out / "results" / self.teacher / self.arm / f"{self.seed}.json"

    @property
    def student(self):
        return self.out / "students" / self.teacher / self.arm / str(self.seed)

    @property
    def log(self):
        return self.out / "logs" / f"{self.teacher}-{self.arm}-{self.seed}.log"

    def of(self, arm):
        """The same for another arm."""
        return replace(self, arm=arm)


def arm_of(arena, name):
    return TEACHER_ARM if name == TEACHER else arena.arms[name]


# --- what a result was made from ---------------------------------------------------------------------------------


def hashed(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def language():
    """A sample of the rows and tests: tells when the data have become others."""
    tests = {kind: {k: v.tolist() for k, v in data.tests(kind, 64, 2, 0).items()} for kind in (*data.LONG, *data.SHORT)}
    return hashed([data.rows(0, 64, 2), tests])


def fingerprints(arena, job):
    """`{"training", "evaluation"}`: what the student, and what its figures depend on. A `resolved` arm is never empty,
    so a teacher has its own.
    """
    from xlstm_arena.students import teacher_digest

    arm = arm_of(arena, job.arm)
    training = hashed([arena.resolved(arm), job.seed, teacher_digest(arena.teacher_dir(job.teacher)), language()])
    return {
        "training": training,
        "evaluation": hashed([training, arena.evaluate, arm.evaluate, arena.window, arena.sinks]),
    }


def read_result(path):
    """A result file, or None where there is none.

    Raises:
        EvaluationError: damaged, or of another format.
    """
    if not path.is_file():
        return None
    where = "/".join(path.parts[-3:])
    refuse = lambda reason: EvaluationError(f"{where} cannot be read ({reason}): remove it, the arena makes it again")  # noqa: E731
    found = read_object(path, RESULT_BYTES, refuse)
    if found.get("format_version") != FORMAT_VERSION or found.get("status") not in (DONE, FAILED):
        raise refuse(f"format_version {found.get('format_version')}, status {found.get('status')!r}")
    return found


def status_of(arena, job):
    """`(DONE, FAILED, STALE or MISSING, its result)`; stale: made from other settings, data or another teacher, or with
    bytes that are wrong.
    """
    found = read_result(job.result)
    if found is None:
        return MISSING, None
    same = found.get("fingerprints") == fingerprints(arena, job) and (
        found["status"] == FAILED or right_bytes(job, found)
    )
    return (found["status"] if same else STALE), found


def right_bytes(job, found):
    """Whether the bytes of a result are what the student's config says of its cache: a count that has missed a part is
    not believed.
    """
    if not (job.student / "config.json").is_file():
        return True
    config, counted = AutoConfig.from_pretrained(job.student), found["rows"]["main"]["cache_bytes"]
    if config.model_type != "xlstm_hybrid":
        return True
    return all(
        sum(cache_bytes(config, int(length), torch.float32).values()) == count for length, count in counted.items()
    )


# --- jobs ------------------------------------------------------------------------------------------------------


def choose_jobs(arena, out, only=None, seeds=None, tier=None, teachers=None):
    """Jobs of a request, teachers and arms that others start from first.

    Args:
        only: names of arms; all by default. `tier`: those of this tier and the ones before it.
        seeds: the arena's by default.
        teachers: names; the first one by default.
    Raises:
        ConfigError: an arm or teacher that is not there, or an arm that is made for none of the teachers.
    """
    wanted, names = list(only or arena.arms), list(teachers or list(arena.teachers)[:1])
    for what, given, known in (("arm", wanted, {**arena.arms, TEACHER: None}), ("teacher", names, arena.teachers)):
        if unknown := [n for n in given if n not in known]:
            raise ConfigError(
                f"{arena.path.name} has no {what} {', '.join(unknown)}: expected some of {', '.join(known)}"
            )
    if tier is not None and not only:
        wanted = [n for n in wanted if arena.arms[n].tier <= tier]
    if odd := [n for n in only or () if not any(arm_of(arena, n).fits(t) for t in names)]:
        raise ConfigError(
            f"{arena.path.name}: {', '.join(odd)} made for other teachers than {', '.join(names)}: see `teachers` of the arm"
        )
    arms = {TEACHER: None}
    for name in wanted:
        for each in reversed(list(line_of(arena, name))):
            arms[each] = None
    return [
        Job(t, a, s, Path(out))
        for s in (arena.seeds if seeds is None else seeds)
        for t in names
        for a in arms
        if arm_of(arena, a).fits(t)
    ]


def line_of(arena, name):
    """The arm and those that it starts from, one after the other."""
    while name is not None:
        yield name
        name = arm_of(arena, name).start


def check_settings(arena, arms):
    """Every trainer's config of the arms is made once, before anything runs; ConfigError lists what they refuse."""
    from xlstm_arena.students import Road

    wrong, seen = [], set()
    for name in arms:
        road = Road(arena, arm_of(arena, name), next(iter(arena.teachers)), 0, Path(".tmp-arena-check"), None)
        for stage in (*road.arm.road, *(road.arm.expert_stages or ())[1:]):
            mark = hashed([stage, arena.settings(road.arm, stage)[0]])
            try:
                if mark not in seen:
                    road.args_of(stage)
            except ConfigError as error:
                wrong.append(str(error))
            seen.add(mark)
    if wrong:
        raise ConfigError(f"{arena.path.name}: {'; '.join(wrong)}")


# --- one job -----------------------------------------------------------------------------------------------------


def work(arena, job, progress=print):
    """Train, unless the student is there, judge, and write the result; a failure is a result as well. Returns the
    result.
    """

    def say(text):
        progress(f"{job}: {text}")

    begin, arm, marks = time.time(), arm_of(arena, job.arm), fingerprints(arena, job)
    result = {
        "format_version": FORMAT_VERSION,
        "status": DONE,
        "teacher": job.teacher,
        "arm": job.arm,
        "seed": job.seed,
        "about": arm.about,
        "tier": arm.tier,
        "fingerprints": marks,
        "settings": arena.resolved(arm),
        "window": arena.window,
        "sinks": arena.sinks,
        "evaluate": {**arena.evaluate, "rows_of_results": arm.evaluate},
    }
    try:
        result["facts"] = trained(arena, job, marks["training"], say)
        result["rows"] = judged(arena, job, say)
    except Exception as error:  # noqa: BLE001, whatever it is, it is recorded and the others go on
        traceback.print_exc()
        result |= {"status": FAILED, "error": f"{type(error).__name__}: {error}"}
        say(f"failed, {result['error']}")
    result["seconds"] = round(time.time() - begin, 1)
    job.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.result, result)
    if result["status"] == DONE:
        say(summary_line(result))
    return result


def summary_line(result):
    """The figures of a result that one wants to see go by."""
    main = result["rows"]["main"]
    recall = {
        kind: " ".join(f"{cell['accuracy']:.2f}" for cell in cells.values()) for kind, cells in main["recall"].items()
    }
    parts = [
        *(f"{kind} {text}" for kind, text in recall.items()),
        f"short {sum(main['short'].values()) / len(main['short']):.3f}",
    ]
    check = main["cached"]
    cached = (
        "no cache"
        if "refused" in check
        else "cache exact"
        if check["passed"]
        else f"CACHE DIFFERS by {check['error']:.2g}"
    )
    return "; ".join([*parts, cached, f"{result['seconds']:.0f} s"])


def trained(arena, job, mark, say):
    """The facts of the job's student, which is made unless it is there with the same mark."""
    from xlstm_arena.students import FACTS, Road

    if job.arm == TEACHER:
        return {}
    made = job.student / "mark.json"
    if made.is_file() and (job.student / FACTS).is_file():
        kept = read_object(made, RESULT_BYTES, CheckpointError)
        if kept.get("training") == mark:
            say("student kept, judged anew")
            return read_object(job.student / FACTS, RESULT_BYTES, CheckpointError)
    work_dir = job.out / f".tmp-{job.teacher}-{job.arm}-{job.seed}-{owner(os.getpid())}"
    made.unlink(missing_ok=True)
    road = Road(arena, arena.arms[job.arm], job.teacher, job.seed, work_dir, lambda name: job.of(name).student, say)
    facts = road.walk(job.student)
    write_json(made, {"training": mark})  # last: a student without it is made again
    return facts


def judged(arena, job, say):
    """{"main": the student as it is, and one entry per row of `evaluate`}."""
    from xlstm_arena.judge import judge
    from xlstm_arena.students import changed, load_on_cpu, seed_of

    model = load_on_cpu(arena.teacher_dir(job.teacher) if job.arm == TEACHER else job.student)
    rows = {"main": {}, **arm_of(arena, job.arm).evaluate}
    found = {}
    for name, changes in rows.items():
        begin, cpu = time.time(), time.process_time()
        shown = changed(model, changes).to("cuda" if torch.cuda.is_available() else "cpu")
        found[name] = judge(shown, arena.evaluate, seed_of(job.seed, "test"), arena.window, arena.sinks)
        found[name] |= {"seconds": round(time.time() - begin, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return found


def in_process(arena, job):
    """`work` in a process of its own with one thread; what it warns of goes to the job's log."""
    torch.set_num_threads(1)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
        sys.stderr = log
        work(arena, job, lambda text: print(text, flush=True))


# --- all jobs ----------------------------------------------------------------------------------------------------


def run(arena, jobs, *, workers=2, minutes=None, redo=False, progress=print):
    """Do the jobs that are missing, have failed, or (with `redo`) are stale. Returns {job: status} of all of them.

    Args:
        workers: processes of one thread each; 0: one after the other in this process.
        minutes: after so many no job is begun any more; those that run end.
    """
    states = {job: status_of(arena, job)[0] for job in jobs}
    todo = [job for job, state in states.items() if state in (MISSING, FAILED) or (redo and state == STALE)]
    kept, stale = sum(s == DONE for s in states.values()), sum(s == STALE for s in states.values())
    progress(
        f"{len(jobs)} jobs: {kept} kept, {len(todo)} to do"
        + (f", {stale} made from other settings (--redo makes them again)" if stale else "")
    )
    deadline = None if minutes is None else time.time() + 60 * minutes
    with environment(workers):
        Crew(arena, states, todo, workers, deadline, progress).go()
    return {job: status_of(arena, job)[0] for job in jobs}


@contextlib.contextmanager
def environment(workers):
    """What worker processes inherit: one thread, quiet libraries."""
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} if workers else {}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class Crew:
    """Worker processes and what they still have to do. A job waits until the arm that it starts from is done, and fails
    if that one has failed.
    """

    def __init__(self, arena, states, todo, workers, deadline, progress):
        self.arena, self.states, self.todo, self.workers, self.deadline, self.progress = (
            arena,
            dict(states),
            list(todo),
            workers,
            deadline,
            progress,
        )
        self.running = {}

    def go(self):
        try:
            while self.todo or self.running:
                if self.deadline is not None and time.time() > self.deadline and self.todo:
                    self.progress(
                        f"the time is up: {len(self.todo)} jobs are not begun, start the same command again to go on"
                    )
                    self.todo = []
                while len(self.running) < max(1, self.workers) and (job := self.next()) is not None:
                    self.start(job)
                self.collect()
        finally:
            for process in self.running.values():
                process.terminate()
                process.join()

    def next(self):
        """The first job whose beginning is there, taken from the list; one whose beginning has failed is written down
        as failed.
        """
        busy = {*self.todo, *self.running}
        for job in list(self.todo):
            start = arm_of(self.arena, job.arm).start
            before = None if start is None else job.of(start)
            if before in busy:
                continue
            self.todo.remove(job)
            if before is None or self.states.get(before) == DONE or status_of(self.arena, before)[0] == DONE:
                return job
            self.fail(
                job,
                f"ConfigError: it starts from {before}, which is {self.states.get(before, MISSING)}: mend that one first",
            )
        return None

    def start(self, job):
        self.progress(f"{job}: begins, {len(self.todo)} wait")
        if not self.workers:
            self.states[job] = work(self.arena, job, self.progress)["status"]
            return
        process = multiprocessing.get_context("spawn").Process(target=in_process, args=(self.arena, job), name=str(job))
        process.start()
        self.running[job] = process

    def collect(self):
        """Wait for a worker to end, and note what became of its job."""
        ended = [job for job, process in self.running.items() if process.exitcode is not None]
        if self.running and not ended:
            time.sleep(POLL)
        for job in ended:
            process = self.running.pop(job)
            process.join()
            self.states[job] = status_of(self.arena, job)[0]
            if process.exitcode or self.states[job] not in (DONE, FAILED):
                self.fail(
                    job,
                    f"the process ended with exit code {process.exitcode} (-9: killed, often for memory); see logs/{job.log.name}",
                )

    def fail(self, job, reason):
        arm = arm_of(self.arena, job.arm)
        self.states[job] = FAILED
        job.result.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            job.result,
            {
                "format_version": FORMAT_VERSION,
                "status": FAILED,
                "teacher": job.teacher,
                "arm": job.arm,
                "seed": job.seed,
                "about": arm.about,
                "tier": arm.tier,
                "fingerprints": fingerprints(self.arena, job),
                "error": reason,
            },
        )
        self.progress(f"{job}: failed, {reason}")
