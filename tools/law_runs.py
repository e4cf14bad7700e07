"""Train the runs that the loss curve of `niels-gpt plan` is fitted to: sizes x tokens, each with its schedule finished

    python tools/law_runs.py --data chitchat=FOLDER [--runs docs/law/runs.json] [--jobs 10] [--seconds 420]
                             [--device cuda] [--precision tf32] --out law.jsonl

FOLDER is where a quickstart ran (or `niels-gpt cache build` with its config): it holds data/cache/quickstart and
artifacts/tokenizer/quickstart. Runs of several processes share one device, longest first; each ends with a line in
--out, and runs whose line is there already are not done again. No run starts later than --seconds. Nothing else is
written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from niels_gpt import paths
from niels_gpt.batching import TokenStream
from niels_gpt.device import choose_precision, resolve_device, usable_cores
from niels_gpt.epochs import TextRows
from niels_gpt.eval import bits_per_byte
from niels_gpt.files import read_json
from niels_gpt.mixes import open_mixes
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import set_learning_rate
from niels_gpt.plan.recipe import Shape, size_of, sized, tuned, with_steps
from niels_gpt.rng import seed_for
from niels_gpt.settings import PHASES, validate_overrides
from niels_gpt.train.budget import Budget
from niels_gpt.train.job import Job
from niels_gpt.train.pretrain import pretrain_job
from niels_gpt.train.sft import Replay, sft_job
from niels_gpt.train.start import Start, start_phase
from niels_gpt.train.step import Stepper


@dataclass(frozen=True)
class Run:
    """One run of the grid."""

    width: int
    layers: int
    heads: int
    mlp: int
    tokens: float  # of both phases together
    drop: float = 0.0
    batch: float = 1.0  # factors on what the recipe chooses
    sft_batch: float = 1.0
    adam: float = 1.0
    muon: float = 1.0
    unique: int | None = None  # tokens of the text to keep; None = all
    seed: int = 42
    data: str = "chitchat"
    tier: int = 1  # those of a lower one go first

    def overrides(self, folder: Path) -> dict[str, Any]:
        shape = Shape(self.width, self.layers, self.heads, self.mlp)
        factors = {"batch": self.batch, "sft_batch": self.sft_batch, "adam": self.adam, "muon": self.muon}
        given = with_steps(sized(tuned(), shape, dropout=self.drop, **factors), self.tokens)
        for phase in PHASES:
            given["training"][phase] |= {"seed": self.seed, "amp": False}
        given["tokenizer"]["model_path"] = str(folder / given["tokenizer"]["model_path"])
        caches = given["data"]["caches"]
        caches |= {key: str(folder / caches[key]) for key in ("pretrain_token_cache", "sft_token_cache")}
        found = sorted(p.parent.name for p in Path(caches["pretrain_token_cache"]).glob("*/meta.json"))
        if not found:
            raise ValueError(f"no caches in {caches['pretrain_token_cache']}; run niels-gpt quickstart there")
        given["data"] |= _mix(caches["pretrain_token_cache"], found, given["data"])
        return given

    @property
    def cost(self) -> float:
        """About how long it takes, to sort by."""
        block = self.layers * self.width * (4 * self.width + 3 * self.mlp)
        return self.tokens * (1 + 1 / self.batch + block / 2e6)


def _mix(root: str, found: list[str], data: dict[str, Any]) -> dict[str, Any]:
    """The recipe's own mix, or if there are other sources each by its tokens and the primer as the recipe has it."""
    if set(found) == set(data["mix_pretrain"]):
        return {}
    primer = data["mix_pretrain"]["primer"]
    others = {name: read_json(Path(root) / name / "meta.json")["train_tokens"] for name in found if name != "primer"}
    total = sum(others.values())
    mix = {name: (1 - primer) * tokens / total for name, tokens in others.items()} | {"primer": primer}
    return {"mix_pretrain": mix, "val_pretrain_source": max(others, key=lambda name: others[name])}


def load_runs(path: Path) -> list[Run]:
    """The grid: {"_why", "sizes": {name: shape}, "runs": [{"size", "tokens": [...], ...}]}."""
    given = read_json(path)
    return [_run(given["sizes"][entry["size"]], entry, tokens) for entry in given["runs"] for tokens in entry["tokens"]]


def _run(shape: dict[str, Any], entry: dict[str, Any], tokens: float) -> Run:
    rest = {key: value for key, value in entry.items() if key not in ("size", "tokens", "_why")}
    return Run(**shape, **rest, tokens=float(tokens))


def train_one(run: Run, folder: Path, device: str, precision: str, windows: int | None) -> dict[str, Any]:
    """Pretrain and fine-tune as the recipe does, on a number of tokens; the line of the result."""
    began = time.perf_counter()
    given = run.overrides(folder)
    given["reproducibility"] = {"torch_matmul_precision": "high" if precision == "tf32" else "highest"}
    given["training"]["native_kernels"] = device == "cpu"
    if precision == "bf16":
        for phase in PHASES:
            given["training"][phase] |= {"amp": True, "amp_dtype": "bf16"}
    settings = validate_overrides(given)
    model: GPT | None = None
    bits: dict[str, dict[str, float]] = {}
    unique, text_rows = 0, 0.0
    for phase in PHASES:
        start = start_phase(phase, given, device=device, resume_path=None, no_auto_resume=True)
        job = pretrain_job(start) if phase == "pretrain" else sft_job(start)
        if model is None:
            torch.manual_seed(seed_for(run.seed, "init"))
            model = GPT(start.resolved.model_cfg, start.resolved.arch).to(device)
        job, unique = _cut(job, start, run.unique)
        text_rows += _train_phase(job, model, start)
        bits[phase] = _bits(model, start, windows)
    assert model is not None
    size = size_of(settings.model)
    pretrain, sft = settings.training.pretrain, settings.training.sft
    tokens = sum(o.total_steps * o.rows for o in (pretrain, sft)) * settings.model.T
    return {
        "run": asdict(run),
        "params": size.parameters,
        "embedding_params": size.embedding,
        **{key: getattr(settings.model, key) for key in ("L", "C", "H", "d_ff", "T", "V", "dropout")},
        "tokens": tokens,
        "text_tokens": text_rows * settings.model.T,
        "unique_tokens": unique,
        "epochs": text_rows * settings.model.T / unique,
        "micro_B": pretrain.micro_B,
        "sft_micro_B": sft.micro_B,
        "lr": pretrain.base_lr,
        "muon_lr": pretrain.muon_lr,
        "seed": run.seed,
        "mix": dict(settings.data.mix_pretrain),
        "source": settings.data.val_pretrain_source,
        "bpb": bits["sft"][settings.data.val_pretrain_source],
        "bpb_pretrained": bits["pretrain"][settings.data.val_pretrain_source],
        "bpb_of": bits,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": precision,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _cut(job: Job, start: Start, unique: int | None) -> tuple[Job, int]:
    """The job on the first `unique` tokens of its text; and how many tokens of text there are to read."""
    T = start.resolved.model_cfg.T
    streams, mix = open_mixes(start.settings, start.tokenizer, T)["train"]
    total = sum(stream.num_tokens for stream in streams.values())
    if unique is None:
        return job, total
    share = unique / total
    cut = {name: TokenStream([a[: int(len(a) * share)] for a in s.arrays], name) for name, s in streams.items()}
    rows = TextRows(cut, mix, T, start.options.seed, backwards=job.phase == "sft")
    owner: Any = job.batch.__self__  # type: ignore[attr-defined]
    batch = Replay(owner.chats, rows, start.settings.data.replay_pretrain).batch if job.phase == "sft" else rows.batch
    return Job(**{**vars(job), "batch": batch}), sum(stream.num_tokens for stream in cut.values())


def _train_phase(job: Job, model: GPT, start: Start) -> float:
    """All steps of one phase with the loop's step and schedule; returns how many rows of text were read."""
    options = start.options
    precision = choose_precision(start.device, options.amp, options.amp_dtype)
    model.train()
    stepper = Stepper(job, model, device=start.device, precision=precision, warn=lambda text: print(text, flush=True))
    budget = Budget(options)
    for step in range(options.total_steps):
        set_learning_rate(stepper.optimizer, budget.learning_rate(step), options)
        stepper.step(step)
    rows = options.total_steps * options.rows
    return rows * (start.settings.data.replay_pretrain if job.phase == "sft" else 1.0)


def _bits(model: GPT, start: Start, windows: int | None) -> dict[str, float]:
    """Bits per byte of every validation source."""
    streams = open_mixes(start.settings, start.tokenizer, model.cfg.T)["val"][0]
    found = {
        name: bits_per_byte(model, stream, start.tokenizer, B=64, device=start.device, max_windows=windows)
        for name, stream in streams.items()
    }
    return {name: round(one.value, 5) for name, one in found.items()}


def _work(run: Run, folder: Path, device: str, precision: str, windows: int | None, until: float) -> dict[str, Any]:
    """One run in a process of its own; {} if it is too late to start, {"error"} if it failed."""
    if time.time() > until:
        return {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)  # a phase writes its settings and makes folders where it is
            try:
                return train_one(run, folder, device, precision, windows)
            finally:
                os.chdir(paths.PROJECT_ROOT)
    except (ValueError, OSError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def results(
    runs: list[Run],
    folders: dict[str, Path],
    *,
    jobs: int,
    device: str,
    precision: str,
    windows: int | None,
    until: float,
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Every run's line, as they end."""
    threads = max(1, usable_cores() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        waiting: dict[Future[dict[str, Any]], Run] = {
            pool.submit(_work, run, folders[run.data], device, precision, windows, until): run for run in runs
        }
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                run = waiting.pop(future)
                yield run, future.result()


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    folders = {}
    for item in args.data:
        name, _, folder = item.rpartition("=")
        folders[name or "chitchat"] = Path(folder).resolve()
    device = resolve_device(args.device)
    precision = args.precision or ("tf32" if device == "cuda" else "fp32")
    out = Path(args.out).resolve()
    done = [json.loads(line)["run"] for line in out.read_text().splitlines()] if out.is_file() else []
    known = [Run(**one) for one in done]
    runs = [run for run in load_runs(Path(args.runs)) if run.data in folders and run not in known]
    runs = [run for run in runs if args.tier is None or run.tier <= args.tier]
    runs = [run for run in runs if args.most_tokens is None or run.tokens <= args.most_tokens]
    runs.sort(key=lambda run: (run.tier, -run.cost))
    print(f"{len(runs)} runs of {sum(r.tokens for r in runs) / 1e6:,.0f} M tokens on {device}, {args.jobs} at once")
    began, failed = time.time(), 0
    options = {"jobs": args.jobs, "device": device, "precision": precision, "windows": args.windows}
    for n, (run, line) in enumerate(results(runs, folders, until=began + args.seconds, **options), 1):
        label = f"{n}/{len(runs)} {run.width}x{run.layers} {run.tokens / 1e6:g} M"
        if "bpb" in line:
            with out.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            print(f"{label}: {line['bpb']:.4f} ({time.time() - began:.0f} s)", flush=True)
        else:
            failed += "error" in line
            print(f"{label}: {line.get('error', 'not started, out of time')}", flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the runs that the loss curve is fitted to.")
    parser.add_argument("--data", action="append", required=True, metavar="[NAME=]FOLDER", help="where caches are")
    parser.add_argument("--runs", default=str(paths.PROJECT_ROOT / "docs/law/runs.json"), metavar="PATH")
    parser.add_argument("--out", required=True, metavar="PATH", help="JSON lines, appended to")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=420.0, help="start no run later (default: %(default)g)")
    parser.add_argument("--tier", type=int, help="only runs of this tier and lower ones")
    parser.add_argument("--most-tokens", type=float, metavar="N", help="only runs of so many tokens at most")
    parser.add_argument("--windows", type=int, help="validation windows per source (default: all)")
    parser.add_argument("--device", help="cpu, mps or cuda; by default the best there is")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="default: tf32 on GPUs, else fp32")
    return parser


if __name__ == "__main__":
    sys.exit(main())
