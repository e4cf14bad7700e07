"""Training killed and signalled: `python -m tests.train.disturbing DIR [--kills N --seed S] [--signals few|all]`.

Children are forked from a process in which everything is imported and has run once, so that an instant drawn at random
falls into training and not into imports. Each trains a pipeline of both phases in a folder of its own; killed, it is
started again there until it ends, and must then have logged the losses and made the weights of a run that nothing
disturbed. DIR must hold config.json and pipeline.json (see test_resume). Prints what came of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.command import Interrupted
from niels_gpt.train import evaluation, pretrain, sft, step
from niels_gpt.train.pipeline import run_pipeline
from niels_gpt.train.saving import Saver
from niels_gpt.train.signals import leaving_on_signals
from tests.train import workshop

PHASES = ("pretrain", "sft")
PLACES = ("start", "data", "step", "evaluation", "save")
Hook = Callable[[str, int], None]


class Child:
    """A forked process that trains in `folder`; what it has saved and what it is doing can be seen from outside."""

    def __init__(self, folder: Path, work: Callable[[], Any], hook: Hook | None = None) -> None:
        self.place = mmap.mmap(-1, 1)
        self.reading, self.writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(folder, work, hook)

    def _work(self, folder: Path, work: Callable[[], Any], hook: Hook | None) -> None:
        code = 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
            self._watch(hook)
            with leaving_on_signals():
                work()
            code = 0
        except Interrupted as stop:
            print(stop)
            code = stop.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def _watch(self, hook: Hook | None) -> None:
        counts = dict.fromkeys(PLACES, 0)

        def watched(owner: Any, name: str, place: str) -> None:
            real = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                before, self.place[0] = self.place[0], PLACES.index(place)
                counts[place] += 1
                if hook is not None:
                    hook(place, counts[place])
                result = real(*args, **kwargs)
                self.place[0] = before
                return result

            setattr(owner, name, call)

        watched(pretrain, "open_mixes", "data")
        watched(sft, "open_mix", "data")
        watched(step.Stepper, "step", "step")
        watched(evaluation, "evaluate", "evaluation")
        watched(ckpt, "save_checkpoint", "save")
        watched(ckpt, "publish", "save")
        save = Saver.save

        def acknowledged(saver: Saver, state: Any, *args: Any, **kwargs: Any) -> bool:
            saved = save(saver, state, *args, **kwargs)
            os.write(self.writing, bytes([PHASES.index(saver.job.phase), *state.step.to_bytes(3, "little")]))
            return saved

        Saver.save = acknowledged  # type: ignore[method-assign]

    def end(self, after: float | None = None) -> int | None:
        """Wait for the end; with `after`, SIGKILL it after so many seconds. Its exit code, None if it was killed."""
        os.close(self.writing)
        deadline = time.monotonic() + (600 if after is None else after)
        status = 0
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() >= deadline:
                os.kill(self.pid, signal.SIGKILL)
                _, status = os.waitpid(self.pid, 0)
                break
            time.sleep(0.0005)
        return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)

    def acknowledged(self) -> dict[str, int]:
        """Newest durable step of each phase, once the child has ended."""
        content = b"".join(iter(lambda: os.read(self.reading, 4096), b""))
        os.close(self.reading)
        records = [content[i : i + 4] for i in range(0, len(content) - 3, 4)]
        return {PHASES[r[0]]: int.from_bytes(r[1:], "little") for r in records}


def result_of(folder: Path) -> dict[str, Any]:
    """What must be the same to the bit: every logged loss, and weights and moments of each phase's files."""
    found: dict[str, Any] = {phase: workshop.steps_logged(folder, phase) for phase in PHASES}
    for phase in PHASES:
        for name in ("latest.pt", "best.pt"):
            found[f"{phase}/{name}"] = workshop.weights_sha(folder / "checkpoints" / phase / name)
    return found


def newest(folder: Path, phase: str) -> int:
    """Step of the checkpoint a resume would take; 0 if there is none."""
    os.chdir(folder)
    path = ckpt.newest_good(phase)
    return ckpt.load_checkpoint(path, device="cpu")["step"] if path is not None else 0


def unloadable(folder: Path) -> int:
    count = 0
    for path in {p.stat().st_ino: p for p in folder.glob("checkpoints/**/*.pt")}.values():
        try:
            ckpt.load_checkpoint(path, device="cpu")
        except ValueError:
            count += 1
    return count


@dataclass(frozen=True)
class Scene:
    """A folder, the work to disturb in it, and what comes of the work undisturbed, in how many seconds."""

    folder: Path
    work: Callable[[], Any]
    straight: dict[str, Any]
    seconds: float


def kill(scene: Scene, kills: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    names = ("kills", "runs", "most_in_a_run", "lost", "unloadable", "different", "failed")
    tally: dict[str, Any] = {**dict.fromkeys(names, 0), "where": dict.fromkeys(PLACES, 0)}
    while tally["kills"] < kills:
        here, in_this_run, durable = scene.folder / f"run{tally['runs']}", 0, dict.fromkeys(PHASES, 0)
        while True:
            child = Child(here, scene.work)
            # At most half a run: a few kills each. The last run of all may end in peace.
            code = child.end(draw.uniform(0, 0.5 * scene.seconds) if tally["kills"] < kills else None)
            durable |= child.acknowledged()
            if code is not None:
                break
            in_this_run += 1
            tally["kills"] += 1
            tally["where"][PLACES[child.place[0]]] += 1
            tally["unloadable"] += unloadable(here)
            tally["lost"] += any(newest(here, phase) < step for phase, step in durable.items())
        tally["runs"] += 1
        tally["failed"] += code != 0
        tally["different"] += code == 0 and result_of(here) != scene.straight
        tally["most_in_a_run"] = max(tally["most_in_a_run"], in_this_run)
        os.chdir(scene.folder)
        if code == 0:
            shutil.rmtree(here)
    return tally


def prepared(folder: Path, *, compiled: bool = False) -> Callable[[], Any]:
    """The work of every child, done once here in a smaller way: imports, first uses and the compiler's caches."""
    config = json.loads((folder / "config.json").read_text())
    for phase in PHASES:
        config["training"][phase]["compile"] = compiled
    (folder / "config.json").write_text(json.dumps(config))
    for phase in PHASES:
        config["training"][phase] |= {"total_steps": 4, "warmup_steps": 0}
    (folder / "short.json").write_text(json.dumps(config))
    names = {"pretrain_config_path": str(folder / "short.json"), "sft_config_path": str(folder / "short.json")}
    (folder / "warm.json").write_text(json.dumps(names))
    (folder / "warm").mkdir()
    os.chdir(folder / "warm")
    output, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
    run_pipeline(folder / "warm.json", device="cpu", no_auto_resume=True)
    sys.stdout = output
    return lambda: run_pipeline(folder / "pipeline.json", device="cpu")


def undisturbed(folder: Path, work: Callable[[], Any]) -> Scene:
    began = time.monotonic()
    code = Child(folder / "straight", work).end()
    seconds = time.monotonic() - began
    assert code == 0, (folder / "straight/output.txt").read_text()
    return Scene(folder, work, result_of(folder / "straight"), seconds)


ONCE = (("data", 1), ("evaluation", 1), ("step", 1), ("step", 9), ("evaluation", 7), ("save", 3))
TWICE = (("save", 3), ("step", 9), ("evaluation", 7))


def signalled(scene: Scene, *, few: bool) -> dict[str, Any]:
    """Each signal at each place; then a second one during native code that takes long. few: the first of each kind."""
    folder, work, straight = scene.folder, scene.work, scene.straight
    found: dict[str, Any] = {}
    for number, (place, nth) in enumerate(ONCE[:2] if few else ONCE):
        signum = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[number % 3]
        here = folder / f"{place}{nth}"
        code, said = one_signal(here, work, place, nth, [signum])
        saved = newest(here, "pretrain")
        again = Child(here, work)
        ended = again.end()
        same = ended == 0 and result_of(here) == straight
        found[f"{place} {nth}"] = {"signal": int(signum), "exit": code, "said": said, "saved": saved, "same": same}
    for place, nth in TWICE[:1] if few else TWICE:
        here = folder / f"twice-{place}{nth}"
        code, said = one_signal(here, work, place, nth, [signal.SIGTERM, signal.SIGTERM], stuck=True)
        sound = unloadable(here) == 0
        again = Child(here, work)
        same = again.end() == 0 and result_of(here) == straight
        found[f"twice {place} {nth}"] = {"exit": code, "said": said, "sound": sound, "same": same}
    return found


def one_signal(
    folder: Path, work: Callable[[], Any], place: str, nth: int, signals: list[int], *, stuck: bool = False
) -> tuple[int | None, str]:
    """Exit code and last line of a child that gets the signals when it comes to a place for the n-th time.

    stuck: it is in the middle of one call of native code then, and says so if that call ends.
    """
    there, at = os.pipe()
    go, going = os.pipe()

    def hook(here: str, count: int) -> None:
        if (here, count) != (place, nth):
            return
        os.write(at, b"!")
        if stuck:
            torch.linalg.svd(torch.randn(4000, 4000))
            print("native code ended")
        else:
            os.read(go, 1)

    child = Child(folder, work, hook)
    assert select.select([there], [], [], 120)[0], f"{place} {nth} is never reached"
    for signum in signals:
        time.sleep(0.2)  # the first must have been seen before the second, or they are one
        os.kill(child.pid, signum)
    os.write(going, b"!")
    code = child.end()
    for handle in (there, at, go, going, child.reading):
        os.close(handle)
    lines = (folder / "output.txt").read_text().splitlines()
    return code, lines[-1] if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", choices=("few", "all"))
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell or nohup ignores would stay ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    folder = args.folder.resolve()
    scene = undisturbed(folder, prepared(folder, compiled=args.compile))
    found: dict[str, Any] = {}
    if args.kills:
        found["kills"] = kill(scene, args.kills, args.seed)
    if args.signals:
        found["signals"] = signalled(scene, few=args.signals == "few")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
