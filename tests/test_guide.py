"""README and guide as a new user goes through them: page by page, each in an empty folder, with divflow from a wheel."""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import built_wheel
import pytest
from filelock import FileLock
from guide import is_there, names, short, shortened, steps, supply
from run import ROOT

README = ROOT / "README.md"
ELSEWHERE = "own_package.md"  # typed in the folder that it is about (tests/test_own_package.py)
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in [README, *sorted((ROOT / "docs").rglob("*.md"))]
    if page.name != ELSEWHERE and any(True for _ in steps(page))
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def environment(tmp_path_factory, worker_id):
    """Its variables; made by the first of the processes of the tests that asks for it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "wheel"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            built_wheel.install(built_wheel.build(folder / "build"), folder / "environment")
    return built_wheel.environment(folder / "environment" / "bin", folder / "cache")


class Reader:
    """Sends requests to `tests/reader.py`."""

    def __init__(self, process, environment):
        self.process, self.environment = process, environment

    def ask(self, request, **given):
        print(json.dumps([request, given]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the reader has ended"
        return json.loads(answer)


@pytest.fixture(scope="module")
def reader(environment):
    python = Path(environment["VIRTUAL_ENV"]) / "bin" / "python"
    # -P: of the tests' folder nothing can be imported
    command = [python, "-P", ROOT / "tests" / "reader.py"]
    with subprocess.Popen(
        command, cwd="/", env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Reader(process, environment)
        process.stdin.close()


class Page:
    """What is typed on one page, in its folder."""

    def __init__(self, reader, folder, log, typed):
        self.reader, self.folder, self.log, self.typed = reader, folder, log, typed
        self.earlier, self.left_out = [], set()
        assert reader.ask("open", folder=str(folder), log=str(log)) is None

    def python(self, code):
        wrong = self.reader.ask("python", code=shortened(code))
        missing = re.search(r"ModuleNotFoundError: No module named '(\w+)|NameError: name '(\w+)' is not", wrong or "")
        if missing and (missing[2] in self.left_out or (missing[1] and importlib.util.find_spec(missing[1]) is None)):
            self.left_out |= names(code)  # another library is not installed, and what follows from it is not there
            return
        assert wrong is None, f"{code}\n{wrong}"
        self.earlier.append(code)

    def command(self, words):
        if not is_there(words):
            self.divflow([*words, "--cfg=job"])
            return
        supply(self.folder, words, self.earlier)
        if outcome(words) is None:
            self.divflow(short(words, drawn=self.typed))
            return
        left = self.folder / outcome(words)
        before = left.resolve() if left.exists() else None
        if words[0] != "train":
            assert not left.exists(), f"{shlex.join(words)}: {left.name} is there from a command before"
        self.divflow(short(words, drawn=self.typed))
        assert left.is_file(), f"{shlex.join(words)} left no {outcome(words)}"
        assert words[0] != "train" or left.resolve() != before

    def divflow(self, words):
        if self.typed:
            line = f"divflow {shlex.join(words)}"
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=self.folder,
                env=self.reader.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
                check=False,
            )
            self.log.write_text(done.stdout)
            wrong = f"ended with {done.returncode}" if done.returncode else None
        else:
            self.log.unlink(missing_ok=True)
            wrong = self.reader.ask("command", words=words)
        assert wrong is None, f"divflow {shlex.join(words)} {wrong}:\n{self.log.read_text()}"


def outcome(words):
    """The file that a command leaves; None if it prints a table alone."""
    given = dict(re.findall(r"(?:^|(?<= ))-{0,2}(out|output_dir)=(\S+)", " ".join(words)))
    if words[0] == "train":
        return f"{given.get('output_dir', 'outputs/latest')}/results.json"
    return given.get("out", {"evaluate": "log_prob.csv", "sample": "samples.csv"}.get(words[0]))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_an_empty_folder(name, reader, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    page = Page(reader, folder, tmp_path / "log.txt", typed=name == "README.md")
    for kind, step in steps(PAGES[name]):
        if "outputs/latest/" in str(step) and not (folder / "outputs").exists():
            page.command(["train"])  # by a reader who comes from another page
        getattr(page, kind)(step)


def test_it_is_the_wheel_that_is_read(reader, tmp_path):
    """And of the working tree there is nothing."""
    page = Page(reader, tmp_path, tmp_path / "log.txt", typed=False)
    page.python(
        "import divflow, divflow.cli.application, sys\nplaces = divflow.__file__, str(divflow.cli.application.config_dir())"
    )
    page.python(f"assert all(place.startswith({reader.environment['VIRTUAL_ENV']!r}) for place in places), places")
    page.python(f"assert not [path for path in sys.path if path.startswith({str(ROOT)!r})], sys.path")
