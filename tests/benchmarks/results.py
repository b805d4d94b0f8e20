"""Results on real problems beside peers: experiments as rows of a table.

    pip install -c constraints.txt -e ".[test,bench,mnist,uci]" && pip install -c constraints.txt --no-deps sbibm
    python tests/benchmarks/results.py uci_casp sbi_slcp

runs these rows, all of them if none is named: ours by `python train.py experiment=ROW seed=...`, and each peer of
`results_rows.py` in turn. Every process is one of its own, whose peak memory is taken. What is found is added to
`outputs/results/results.json`, seed by seed; what is there is not run again, so that a run that was stopped goes on, unless
`--again` says so. From it the table and the figure are made, which `--publish` puts into docs/results.md, and six rows of it into the README. A word with = is a
setting of ours, for trials: trainer.max_steps=20 trainer.val_check_interval=10 --seeds 0 --out elsewhere.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from results_rows import ROWS, Row  # noqa: E402 - the folders are no packages
from results_table import draw, markdown, publish  # noqa: E402

ROOT = HERE.parents[1]
Result = dict[str, Any]


def main() -> None:
    """Run the rows that are named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="rows, and settings of ours with =")
    parser.add_argument("--seeds", type=numbers, help="such as 0,1,2, in place of the rows' own")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "results")
    parser.add_argument("--again", action="store_true", help="run what is there, too")
    parser.add_argument(
        "--publish", action="store_true", help="put table and figure into the documentation, and run nothing"
    )
    arguments = parser.parse_intermixed_args()
    settings = [word for word in arguments.words if "=" in word]
    names = [word for word in arguments.words if "=" not in word] or list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; they are {', '.join(ROWS)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    found: list[Result] = json.loads(file.read_text()) if file.is_file() else []
    failed = []
    for name in [] if arguments.publish else with_starts(names):
        for seed in arguments.seeds or ROWS[name].seeds:
            others = [result for result in found if (result["row"], result["seed"]) != (name, seed)]
            if len(others) < len(found) and not arguments.again:
                continue
            try:
                found = others + run_row(name, ROWS[name], seed, settings, out)
            except subprocess.CalledProcessError as error:
                failed.append(f"{name}, seed {seed}: {error}")
            file.write_text(json.dumps(found, indent=2) + "\n")
    print(markdown(found))
    draw(found, out / "results.png")
    if arguments.publish:
        publish(found, out, ROOT)
    if failed:
        raise SystemExit("\n".join(failed))


def numbers(text: str) -> list[int]:
    """Of 0,1,2."""
    return [int(part) for part in text.split(",")]


def with_starts(names: Sequence[str]) -> list[str]:
    """Every row after the one that it starts from."""
    starts = [start for name in names if (start := ROWS[name].start) and start not in names]
    return sorted({*names, *starts}, key=list(ROWS).index)


def run_row(name: str, row: Row, seed: int, settings: Sequence[str], out: Path) -> list[Result]:
    """Ours and every peer, for one seed."""
    folder = out / name / str(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shown = ["python", "train.py", f"experiment={name}", f"seed={seed}", *settings]
    if row.start:
        weights = out / row.start / str(seed) / "checkpoints" / "best.ckpt"
        shown.append(f"init_from={os.path.relpath(weights, ROOT)}")
    peak = run([*shown, f"output_dir={folder}", "callbacks.progress=null", "+trainer.enable_progress_bar=false"])
    trained = json.loads((folder / "results.json").read_text())
    measure = [row.measure] if row.measure else []
    more = script("results_measures.py", folder, folder / "measures.json", *measure)
    metrics = {metric.removeprefix("test/"): value for metric, value in trained["metrics"].items()}
    ours = {
        "metrics": metrics | more["metrics"],
        "parameters": more["parameters"],
        **{item: trained[item] for item in ("seconds", "steps", "versions")},
    }
    common = {"row": name, "seed": seed, "machine": machine()}
    results = [common | {"who": "divflow", "command": shlex.join(shown), "peak_memory_mib": peak} | ours]
    for peer in row.peers:
        theirs = script("results_peers.py", peer, folder, folder / f"{peer}.json", *measure)
        command = f"python tests/benchmarks/results.py {name} --seeds {seed}"
        results.append(common | {"who": peer, "command": command} | theirs)
    return results


def script(name: str, *arguments: str | Path) -> Result:
    """What a script beside this one writes to the one of its arguments that ends in .json, and its peak memory."""
    peak = run(["python", str(HERE / name), *map(str, arguments)])
    (file,) = [argument for argument in arguments if isinstance(argument, Path) and argument.suffix == ".json"]
    return json.loads(file.read_text()) | {"peak_memory_mib": peak}


def run(command: Sequence[str]) -> float:
    """Run a command in a process of its own; its peak memory in MiB."""
    print("+", shlex.join(command), file=sys.stderr, flush=True)
    paths = os.pathsep.join([str(ROOT), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, shlex.join(command))
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> str:
    """The processor, and the threads that torch takes of it."""
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    return f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
