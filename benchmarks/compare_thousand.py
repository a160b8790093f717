"""How long `lit-distill compare` takes over 1,000 runs, and its page in a browser.

    python benchmarks/compare_thousand.py [--runs 1000] [--sweep] [--repeats 3]

The runs are made up, but of the size of real ones: 130 lines of configuration, 120 rows of metrics, a reliability
diagram or a picture in each summary. By default five seeds of 200 settings in four domains; with `--sweep` every run
has settings of its own, so that there are as many rows as runs. Times are of whole processes, interpreter's start
included; the smallest of the repeats is printed.
"""

import argparse
import json
import math
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DOMAINS = {
    "image": ("lit_distill.image", "CIFAR10DataModule", "test/acc", ("KD", "DKD", "AT", "CRD", "RKD")),
    "graph": ("lit_distill.graph", "NCI1DataModule", "test/auroc", ("KD", "Mirage", "LSP", "FeatureKD", "GLNN")),
    "llm": ("lit_distill.llm", "TextDataModule", "test/perplexity", ("ForwardKL", "ReverseKL", "JSD", "TAID", "GKD")),
    "diffusion": ("lit_distill.diffusion", "DigitsDataModule", "test/fd", ("DMD", "DMD2", "SiD", "ADD", "MSD")),
}
TRAINER = "".join(f"  setting_{number}: null\n" for number in range(40))
OPTIMIZER = "".join(f"        flag_{number}: false\n" for number in range(10))
LAYERS = "".join(f"        - {number}\n" for number in range(30))
CONFIG = """# lightning.pytorch==2.6.6
seed_everything: {seed}
trainer:
  accelerator: cpu
  max_steps: 6000
{trainer}model:
  class_path: {package}.{method}
  init_args:
    student:
      class_path: {package}.Student
      init_args:
        width: 16
        layers:
{layers}    teacher:
      class_path: lit_distill.core.pretrained
      init_args:
        weights: runs/{domain}/teacher-s{seed}
    temperature: {temperature}
    optimizer:
      class_path: torch.optim.AdamW
      init_args:
        lr: {lr}
{optimizer}data:
  class_path: {package}.{data}
  init_args:
    root: data/{domain}
    batch_size: 128
    seed: {seed}
run:
  root: runs
  experiment: {domain}
  name: {name}
  stage: {stage}
  test: true
  key: r{key:016x}
"""


def make_runs(root: Path, count: int, *, sweep: bool) -> None:
    """Writes run folders like those that training leaves."""
    rng = random.Random(0)
    seeds = 1 if sweep else 5
    each = count // len(DOMAINS)
    picture = bytes(rng.randrange(256) for _ in range(14_000))
    for domain, (package, data, metric, methods) in DOMAINS.items():
        for number in range(each):
            setting, seed = divmod(number, seeds)
            stage = "baseline" if setting == 0 else f"{methods[setting % len(methods)].lower()}-{setting}"
            method = methods[setting % len(methods)]
            folder = root / domain / f"{stage}-s{seed}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(
                CONFIG.format(
                    seed=seed, package=package, data=data, domain=domain, stage=stage, trainer=TRAINER, layers=LAYERS,
                    method=method, temperature=1 + setting * 0.1, lr=0.1 / (1 + setting),
                    optimizer=OPTIMIZER, name=folder.name, key=rng.getrandbits(64),
                )
            )  # fmt: skip
            quality = 0.6 + 0.3 * rng.random()
            (folder / "metrics.csv").write_text(history(quality, rng))
            if number % 20 == 0:
                (folder / "samples.png").write_bytes(picture)
            (folder / "summary.json").write_text(
                json.dumps(
                    summary(folder, package, data, metric, methods[setting % len(methods)], stage, seed, quality)
                )
            )


def history(quality: float, rng: random.Random) -> str:
    """100 rows of training, 20 of validation, and columns that only the last rows fill."""
    names = ["train/loss", "train/ce", "train/kd", "train/lr", "val/acc", "val/nll", "val/ece", "val/kl"]
    names += [f"test/m{number}" for number in range(8)] + [f"efficiency/m{number}" for number in range(6)]
    rows = ["step,epoch," + ",".join(names)]
    for step in range(49, 6000, 50):
        loss = math.exp(-step / 2000) + 0.05 * rng.random()
        cells = [""] * len(names)
        if step % 300 == 299:
            cells[4:8] = [repr(quality * (1 - math.exp(-step / 900))), repr(loss), repr(loss / 9), repr(loss / 3)]
        else:
            cells[:4] = [repr(loss), repr(loss * 0.6), repr(loss * 0.4), "0.1"]
        rows.append(f"{step},{step // 500}," + ",".join(cells))
    rows.append("6000,12," + ",".join([""] * 8 + ["0.5"] * 14))
    return "\n".join(rows) + "\n"


def summary(
    folder: Path, package: str, data: str, metric: str, method: str, stage: str, seed: int, quality: float
) -> dict[str, Any]:
    """A summary of schema 1."""
    metrics = {"test/acc": quality, "test/ece": 0.1 - 0.1 * quality, "test/nll": 1 - quality}
    metrics |= {f"val/m{number}": quality / (number + 1) for number in range(8)} | {metric: quality, "test/nfe": 4.0}
    bins = [(i + 0.5) / 15 for i in range(15)]
    panels: dict[str, Any] = {"reliability": {"confidence": bins, "accuracy": bins, "count": [7] * 15}}
    if (folder / "samples.png").exists():
        panels["samples"] = {
            "file": "samples.png",
            "title": "40 samples",
            "summary": "",
            "head": ["n"],
            "rows": [["40"]],
        }
    params = 10_000 * (1 + len(stage))
    return {
        "schema": 1, "experiment": folder.parent.name, "name": folder.name, "stage": stage,
        "method": f"{package}.{method}", "domain": folder.parent.name, "data": f"{package}.{data}",
        "networks": {
            "student": {"class_path": f"{package}.Student", "params": params},
            "teacher": {"class_path": f"{package}.Teacher", "params": 1_000_000},
        },
        "seed": seed, "metric": metric, "metrics": metrics, "panels": panels, "config_hash": "0" * 16,
        "efficiency": {
            "student_params": params, "teacher_params": 1_000_000, "compression": 1_000_000 / params,
            "student_flops": params * 20.0, "inference_samples_per_second": 1e9 / params, "peak_memory_bytes": 8e8,
        },
        "versions": {"lit_distill": "0.1.0", "torch": "2.14.1"}, "machine": {"system": "Linux", "cpus": 2},
        "started": f"2026-03-01T10:{seed:02d}:00+00:00", "finished": f"2026-03-01T11:{seed:02d}:00+00:00",
        "seconds": 3600.0 * quality,
    }  # fmt: skip


def seconds_of(command: list[str], repeats: int) -> str:
    """The shortest of several whole processes, and the least of their CPU time, which other work does not touch."""
    times, cpu = [], []
    for _ in range(repeats):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(time.perf_counter() - start)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return f"{min(times):.2f} s ({min(cpu):.2f} s of CPU time)"


def in_browser(page: Path, repeats: int) -> dict[str, float]:
    """Milliseconds of loading, of a key-stroke in the filter, of sorting, and of selecting a row."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver") or ""))
    # From the event to the frame in which its effect is on the screen.
    until_drawn = """
        const done = arguments[arguments.length - 1];
        const start = performance.now();
        (%s)();
        requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
    """
    type_word = """() => {{ const box = document.getElementById("filter"); box.value = {};
        box.dispatchEvent(new Event("input", {{ bubbles: true }})); }}"""
    try:
        loads, keys, sorts, picks = [], [], [], []
        for _ in range(repeats + 1):  # the first start of a browser is its own
            driver.get(page.as_uri())
            loads.append(
                driver.execute_script("const t = performance.timing; return t.loadEventEnd - t.navigationStart")
            )
            for word in ("d", "dm", "dmd", "dmd-", ""):
                keys.append(driver.execute_async_script(until_drawn % type_word.format(json.dumps(word))))
            sorts.append(
                driver.execute_async_script(
                    until_drawn % '() => document.querySelectorAll("table.runs button.sort")[3].click()'
                )
            )
            picks.append(
                driver.execute_async_script(
                    until_drawn % '() => document.querySelectorAll("table.results input.pick")[3].click()'
                )
            )
    finally:
        driver.quit()
    return {
        "load": min(loads[1:]),
        "key-stroke, median": statistics.median(keys),
        "key-stroke, slowest": max(keys[5:]),
        "sort": min(sorts),
        "select a row": min(picks),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--sweep", action="store_true", help="as many rows as runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder to keep the runs and the page in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        runs, page = folder / "runs", folder / "page.html"
        if not runs.exists():
            make_runs(runs, options.runs, sweep=options.sweep)
        command = [sys.executable, "-m", "lit_distill", "compare", str(runs)]
        print(f"compare {options.runs} runs: {seconds_of(command, options.repeats)}")
        every = [*command, "--json", str(folder / "c.json"), "--csv", str(folder / "c.csv")]
        every += ["--markdown", str(folder / "c.md"), "--latex", str(folder / "c.tex")]
        print(f"with Markdown, LaTeX, CSV and JSON: {seconds_of(every, options.repeats)}")
        print(f"with the page: {seconds_of([*command, '--html', str(page)], options.repeats)}")
        print(f"size of the page: {page.stat().st_size / 1e6:.1f} MB")
        if shutil.which("chromium") and shutil.which("chromedriver"):
            for what, milliseconds in in_browser(page, options.repeats).items():
                print(f"{what}: {milliseconds:.0f} ms")


if __name__ == "__main__":
    main()
