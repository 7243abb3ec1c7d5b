"""The arena's command: every (teacher, arm, seed) is a job that leaves one JSON; started again, it goes on with what is
missing.

OUT/results/TEACHER/ARM/SEED.json     what was measured, or why it failed, with fingerprints of what it was made from
OUT/students/TEACHER/ARM/SEED/        the student: evaluated anew without training, and where other arms start
OUT/logs/TEACHER-ARM-SEED.log         warnings and tracebacks
"""

import contextlib
import hashlib
import itertools
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
END = 10  # seconds that a worker has to end in, once it is told to
DONE, FAILED, STALE, MISSING = "done", "failed", "stale", "not run"
TEACHER_ARM = Arm(TEACHER, about="The teacher itself.", tier=1, stages=[])


@dataclass(frozen=True)
class ArenaJob:
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

    def write(self, arena, status, **more):
        """Write a result beside what says whose it is, and return it."""
        arm = arm_of(arena, self.arm)
        head = {"format_version": FORMAT_VERSION, "status": status, "teacher": self.teacher, "arm": self.arm}
        result = head | {"seed": self.seed, "about": arm.about, "tier": arm.tier, **more}
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.result, result)
        return result


def arm_of(arena, name):
    return TEACHER_ARM if name == TEACHER else arena.arms[name]


# --- what a result was made from ---------------------------------------------------------------------------------


def hashed(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprints(arena, job):
    """`{"training", "evaluation"}`: what the student, and what its figures depend on. A `resolved` arm is never empty,
    so a teacher has its own.
    """
    from xlstm_arena.students import teacher_digest

    arm = arm_of(arena, job.arm)
    # a sample of the rows and tests tells when the data have become others
    tests = {kind: {k: v.tolist() for k, v in data.tests(kind, 64, 2, 0).items()} for kind in (*data.LONG, *data.SHORT)}
    language, weights = hashed([data.rows(0, 64, 2), tests]), teacher_digest(arena.teacher_dir(job.teacher))
    training = hashed([arena.resolved(arm), job.seed, weights, language])
    evaluation = hashed([training, arena.evaluate, arm.evaluate, arena.window, arena.sinks])
    return {"training": training, "evaluation": evaluation}


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
    result = read_result(job.result)
    if result is None:
        return MISSING, None
    same = result.get("fingerprints") == fingerprints(arena, job)
    return (result["status"] if same and (result["status"] == FAILED or right_bytes(job, result)) else STALE), result


def right_bytes(job, result):
    """Whether the bytes of a result are what the student's config says of its cache: a count that has missed a part is
    not taken.
    """
    if not (job.student / "config.json").is_file():
        return True
    config, counted = AutoConfig.from_pretrained(job.student), result["rows"]["main"]["cache_bytes"]
    if config.model_type != "xlstm_hybrid":
        return True
    expected = {length: sum(cache_bytes(config, int(length), torch.float32).values()) for length in counted}
    return counted == expected


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
            names = f"{what} {', '.join(unknown)}"
            raise ConfigError(f"{arena.path.name} has no {names}: expected some of {', '.join(known)}")
    if tier is not None and not only:
        wanted = [n for n in wanted if arena.arms[n].tier <= tier]
    if odd := [n for n in only or () if not any(arm_of(arena, n).fits(t) for t in names)]:
        others = f"{', '.join(odd)} made for other teachers than {', '.join(names)}"
        raise ConfigError(f"{arena.path.name}: {others}: see `teachers` of the arm")
    arms = [TEACHER, *(each for name in wanted for each in reversed(list(line_of(arena, name))))]
    order = itertools.product(arena.seeds if seeds is None else seeds, names, dict.fromkeys(arms))
    return [ArenaJob(t, a, s, Path(out)) for s, t, a in order if arm_of(arena, a).fits(t)]


def line_of(arena, name):
    """The arm and those that it starts from, one after the other."""
    while name is not None:
        yield name
        name = arm_of(arena, name).start


def check_trainer_settings(arena, arms):
    """Make every trainer's config of the arms once, before anything runs; ConfigError lists what they refuse."""
    from xlstm_arena.students import Training

    wrong, seen = [], set()
    for name in arms:
        arm = arm_of(arena, name)
        training = Training(arena, arm, next(iter(arena.teachers)), 0, Path(".tmp-arena-check"), None)
        for stage in (stage for stage in arm.every_stage if stage != "calibrate"):  # that has no trainer
            mark = hashed([stage, arena.settings(arm, stage)[0]])
            try:
                if mark not in seen:
                    training.args_of(stage)
            except ConfigError as error:
                wrong.append(str(error))
            seen.add(mark)
    if wrong:
        raise ConfigError(f"{arena.path.name}: {'; '.join(wrong)}")


# --- one job -----------------------------------------------------------------------------------------------------


def work(arena, job, progress=print):
    """Train, unless the student is there, evaluate, and write the result; a failure is one as well. Returns it."""

    def say(text):
        progress(f"{job}: {text}")

    begin, arm, marks = time.time(), arm_of(arena, job.arm), fingerprints(arena, job)
    more = {"fingerprints": marks, "settings": arena.resolved(arm), "window": arena.window, "sinks": arena.sinks}
    more["evaluate"], status = {**arena.evaluate, "rows_of_results": arm.evaluate}, DONE
    try:
        more["facts"] = train_student(arena, job, marks["training"], say)
        more["rows"] = evaluate_student(arena, job)
    except Exception as error:  # noqa: BLE001, whatever it is, it is recorded and the others go on
        traceback.print_exc()
        status, more["error"] = FAILED, f"{type(error).__name__}: {error}"
        say(f"failed, {more['error']}")
    result = job.write(arena, status, **more, seconds=round(time.time() - begin, 1))
    if status == DONE:
        say(summary_line(result))
    return result


def summary_line(result):
    """The figures of a result that one wants to see go by."""
    main = result["rows"]["main"]
    parts = [
        " ".join([kind, *(f"{cell['accuracy']:.2f}" for cell in cells.values())])
        for kind, cells in main["recall"].items()
    ]
    parts.append(f"short {sum(main['short'].values()) / len(main['short']):.3f}")
    check = main["cached"]
    if "refused" in check:
        parts.append("no cache")
    else:
        parts.append("cache exact" if check["passed"] else f"CACHE DIFFERS by {check['error']:.2g}")
    return "; ".join([*parts, f"{result['seconds']:.0f} s"])


def train_student(arena, job, mark, say):
    """The facts of the job's student, which is trained unless it is there with the same mark."""
    from xlstm_arena.students import FACTS, Training

    if job.arm == TEACHER:
        return {}
    file, facts = job.student / "mark.json", job.student / FACTS
    there = file.is_file() and facts.is_file() and read_object(file, RESULT_BYTES, CheckpointError)
    if there and there.get("training") == mark:
        say("the student is there, evaluated anew")
        return read_object(facts, RESULT_BYTES, CheckpointError)
    work_dir = job.out / f".tmp-{job.teacher}-{job.arm}-{job.seed}-{owner(os.getpid())}"
    file.unlink(missing_ok=True)
    starts = lambda name: replace(job, arm=name).student  # noqa: E731
    facts = Training(arena, arena.arms[job.arm], job.teacher, job.seed, work_dir, starts, say).run(job.student)
    write_json(file, {"training": mark})  # last: a student without it is trained again
    return facts


def evaluate_student(arena, job):
    """{"main": the scores of the student as it is, and one entry per row of the arm's `evaluate`}."""
    from xlstm_arena.scoring import student_scores
    from xlstm_arena.students import changed, load_float32, seed_for

    model = load_float32(arena.teacher_dir(job.teacher) if job.arm == TEACHER else job.student)
    rows = {"main": {}, **arm_of(arena, job.arm).evaluate}
    for name, changes in rows.items():
        begin, cpu = time.time(), time.process_time()
        student = changed(model, changes).to("cuda" if torch.cuda.is_available() else "cpu")
        rows[name] = student_scores(student, arena.evaluate, seed_for(job.seed, "test"), arena.window, arena.sinks)
        rows[name] |= {"seconds": round(time.time() - begin, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return rows


def in_process(arena, job):
    """`work` in a process of its own with one thread; what it warns of goes to the job's log."""
    torch.set_num_threads(1)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
        sys.stderr = log
        work(arena, job, lambda text: print(text, flush=True))


# --- all jobs ----------------------------------------------------------------------------------------------------


def run_jobs(arena, jobs, *, workers=2, minutes=None, redo=False, progress=print):
    """Do the jobs that are missing, have failed, or (with `redo`) are stale. Returns {job: status} of all of them.

    Args:
        workers: processes of one thread each; 0: one after the other in this process.
        minutes: after so many no job is begun any more; those that run end.
    """
    states = {job: status_of(arena, job)[0] for job in jobs}
    todo = [job for job, state in states.items() if state in (MISSING, FAILED) or (redo and state == STALE)]
    done, stale = (list(states.values()).count(state) for state in (DONE, STALE))
    more = f", {stale} made from other settings (--redo makes them again)" if stale else ""
    progress(f"{len(jobs)} jobs: {done} done, {len(todo)} to do{more}")
    deadline = None if minutes is None else time.time() + 60 * minutes
    with worker_environment(workers):
        Crew(arena, states, todo, workers, deadline, progress).go()
    return {job: status_of(arena, job)[0] for job in jobs}


@contextlib.contextmanager
def worker_environment(workers):
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
        self.arena, self.workers, self.deadline, self.progress = arena, workers, deadline, progress
        self.states, self.todo, self.running = dict(states), list(todo), {}

    def go(self):
        try:
            while self.todo or self.running:
                if self.deadline is not None and time.time() > self.deadline and self.todo:
                    left = f"{len(self.todo)} jobs are not begun"
                    self.progress(f"the time is up: {left}, start the same command again to go on")
                    self.todo = []
                while len(self.running) < max(1, self.workers) and (job := self.next()) is not None:
                    self.start(job)
                self.collect()
        finally:
            for process in self.running.values():
                process.terminate()
            for process in self.running.values():
                process.join(END)
                process.kill()  # one that does not listen
                process.join(END)

    def next(self):
        """The first job whose beginning is there, taken from the list; one whose beginning has failed is written down
        as failed.
        """
        busy = {*self.todo, *self.running}
        for job in list(self.todo):
            start = arm_of(self.arena, job.arm).start
            before = None if start is None else replace(job, arm=start)
            if before in busy:
                continue
            self.todo.remove(job)
            if before is None or self.states.get(before) == DONE or status_of(self.arena, before)[0] == DONE:
                return job
            state = self.states.get(before, MISSING)
            self.fail(job, f"ConfigError: it starts from {before}, which is {state}: mend that one first")
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
                code = f"exit code {process.exitcode} (-9: killed, often for memory)"
                self.fail(job, f"the process ended with {code}; see logs/{job.log.name}")

    def fail(self, job, reason):
        self.states[job] = FAILED
        job.write(self.arena, FAILED, fingerprints=fingerprints(self.arena, job), error=reason)
        self.progress(f"{job}: failed, {reason}")
