"""The house rules: what holds for every lesson, every module and the files around them."""
import ast
import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
MODULES = [path for path in sorted((ROOT / "daisy").glob("*.py")) if not path.name.startswith("_")]
NUMBER = {"lesson" if path.stem == "00_tour" else path.stem[3:]: int(path.stem[:2]) for path in LESSONS}

lessons = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
modules = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def cells(path, kind=None) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found if kind in (None, cell["cell_type"])]


def outputs(path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def exported(cell) -> bool:
    return re.search(r"^#\|\s*export", cell["source"], re.M) is not None


def python_of(cell) -> ast.Module:
    "A cell's syntax tree, without lines that only a notebook understands."
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell["source"], flags=re.M))


# lessons

def test_there_are_lessons_and_modules():
    assert LESSONS and MODULES


@lessons
def test_a_lesson_opens_with_a_question(path):
    opening = cells(path)[0]
    assert opening["cell_type"] == "markdown" and opening["source"].startswith("# ") and "?" in opening["source"]
    assert re.search(r"\d", opening["source"].partition("\n")[2]), "the question comes with a number"


@lessons
def test_a_lesson_exports_the_module_of_its_name(path):
    names = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cell["source"] for cell in cells(path, "code")), re.M)
    assert names == ["lesson" if path.stem == "00_tour" else path.stem[3:]]
    assert (ROOT / "daisy" / f"{names[0]}.py").is_file()


@lessons
def test_a_lesson_tests_what_it_exports(path):
    calls = [cell["source"] for cell in cells(path, "code") if not exported(cell)]
    assert any(re.search(r"^\s*assert\b|assert_close|raises\(", source, re.M) for source in calls)


@lessons
def test_a_lesson_has_two_exercises_with_solutions(path):
    if path.stem == "00_tour": pytest.skip("the tour shows how exercises work")
    code = [cell["source"] for cell in cells(path, "code")]
    assert sum("check(" in source and "must_pass=True" not in source for source in code) >= 2, "two stubs that call check"
    solutions = [cell for cell in cells(path, "code") if "must_pass=True" in cell["source"]]
    assert len(solutions) >= 2, "two solutions that check with must_pass=True"
    for cell in solutions:
        assert re.match(r"#\|\s*code-fold:\s*true", cell["source"]), "a solution begins with `#| code-fold: true`"
        assert cell["metadata"].get("jupyter") == {"source_hidden": True}, "daisy-run-lessons folds it"


@lessons
def test_a_lesson_closes_with_a_table(path):
    if path.stem == "00_tour": pytest.skip("the tour is the way in")
    shown = [cell["source"] for cell in cells(path)[-4:] if cell["cell_type"] == "markdown"]
    for cell in cells(path)[-4:]:
        for output in cell.get("outputs", []):
            shown += ["".join(text) for kind, text in output.get("data", {}).items() if kind in ("text/markdown", "text/html")]
    assert any(re.search(r"^\|\s*:?-|<table", text, re.M) for text in shown), "a table of what was measured, written or computed"


@notebooks
def test_a_picture_is_stored(path):
    assert any("image/png" in output.get("data", {}) for output in outputs(path))


@notebooks
def test_outputs_are_stored_readable_and_without_errors(path):
    assert outputs(path)
    for output in outputs(path):
        assert output["output_type"] != "error", output.get("evalue")
        assert output.get("name") != "stderr", output
        assert not any("widget" in kind for kind in output.get("data", {})), "a saved widget shows nothing to a static reader"
        assert "\x1b" not in json.dumps(output, ensure_ascii=False)


@notebooks
def test_the_title_cell_holds_no_list_with_colons(path):
    "nbdev reads `- key: value` lines of the cell with the title as settings, `skip_exec` among them."
    assert not re.search(r"^-\s+\S.*:.*\S", cells(path)[0]["source"], re.M)


@notebooks
def test_a_notebook_stays_light(path):
    assert path.stat().st_size < 2_000_000, "stored pictures too large"


@notebooks
def test_a_notebook_names_no_place_that_its_reader_lacks(path):
    text = "\n".join(cell["source"] for cell in cells(path)) + json.dumps([
        output.get("text", output.get("data", {}).get("text/plain")) for output in outputs(path)])
    found = re.findall(r"(?<![\w.])/(?:work|tmp|home|root|Users)/\S*|\b(?:issue|promise|session) #?\d+|acceptance\.md|toolchain\.md|style\.md", text)
    assert not found


@notebooks
def test_a_notebook_links_only_to_what_exists(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", "\n".join(cell["source"] for cell in cells(path, "markdown"))):
        assert (path.parent / target).exists(), target


@notebooks
def test_no_star_imports(path):
    for cell in cells(path, "code"):
        stars = [node for node in ast.walk(python_of(cell)) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
        assert not stars, cell["source"]


@lessons
def test_exported_imports_stand_in_cells_of_their_own(path):
    for cell in filter(exported, cells(path, "code")):
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in python_of(cell).body}
        assert len(kinds) < 2, f"imports and code in one exported cell:\n{cell['source']}"


# modules

@modules
def test_a_module_belongs_to_a_lesson_and_imports_only_lower_ones(path):
    assert path.stem in NUMBER, "no notebook exports it"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [(node.module or node.names[0].name) if node.level else node.module]
            if not node.level and not node.module.startswith("daisy"): continue
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "daisy"]
        for name in names:
            used = name.removeprefix("daisy.").split(".")[0]
            assert used != "lesson", "lesson.py is for notebooks only"
            assert NUMBER[used] < NUMBER[path.stem], f"{path.stem} imports {used}"


@modules
def test_a_module_does_nothing_on_its_own(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, harmless) or docstring, ast.unparse(node)[:100]


PROBE = """
import os, random, sys, threading, time
for name in ("matplotlib", "ipywidgets", "nbdev", "execnb", "IPython", "pandas", "pyarrow"): sys.modules[name] = None
import torch
before, environment, state = torch.get_rng_state(), dict(os.environ), random.getstate()
import importlib
for name in sys.argv[1:]: importlib.import_module("daisy." + name)
assert not torch.cuda.is_initialized() and threading.active_count() == 1
assert torch.equal(before, torch.get_rng_state()) and state == random.getstate() and environment == dict(os.environ)
assert not os.listdir("."), os.listdir(".")
"""


def test_modules_import_anywhere_and_do_no_work(tmp_path):
    "No CUDA, none of the notebooks' packages, no file, thread, environment variable or random number used."
    names = [path.stem for path in MODULES if path.stem != "lesson"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE, *names], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr


def test_import_daisy_is_lighter_than_import_torch():
    code = "import sys; before = set(sys.modules); import daisy; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["daisy"]


# files around them

def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_requirements_are_those_of_settings():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == settings()["requirements"].split()


def test_the_conda_environment_is_complete():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, listed = environment["dependencies"]
    assert python.startswith(f"python>={settings()['min_python']}") and pip == "pip" and environment["channels"]
    assert listed["pip"] == [*settings()["requirements"].split(), *settings()["dev_requirements"].split(), "-e ."]


def test_what_modules_import_is_required():
    "Every package imported at the top of a module stands in settings.ini; optional ones are imported where they are used."
    required = {re.split(r"[<>=]", name)[0] for name in settings()["requirements"].split()} - {"pyyaml"} | {"yaml"}
    for path in MODULES:
        if path.stem == "lesson": continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                package = name.split(".")[0]
                assert package in sys.stdlib_module_names or package in required, f"{path.name} imports {package}"


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_begins_with_its_two_lines():
    main, tests = re.findall(r"^```sh\n(.*?)^```", readme(), re.M | re.S)[:2]
    assert main == "pip install -e . && ./run.sh config/tiny.yml\n" and tests == "pip install -e '.[dev]' && ./test.sh\n"
    assert "PASTE" not in readme()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_commands_and_links_name_files_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    commands = "\n".join(re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S))
    named = re.findall(r"(?:^|\s)(?:\./)?((?:config|nbs|data|tests)/[\w./-]+|[\w-]+\.(?:sh|py|yml|txt))", commands)
    assert named
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    for target in [*named, *links]:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["run.sh", "test.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(name):
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_root_scripts_only_call_the_package():
    for name in ("train.py", "launch.py", "sample.py", "build_sft_shards.py"):
        docstring, *body = ast.parse((ROOT / name).read_text(encoding="utf-8")).body
        assert [type(node) for node in body] == [ast.Import, ast.ImportFrom, ast.If]


def test_every_lesson_stands_in_both_tables_with_its_question():
    index = "\n".join(cell["source"] for cell in cells(ROOT / "nbs" / "index.ipynb", "markdown"))
    rows = r"^\| (?:\[(\d\d [\w ]+)\]\((?:nbs/)?([\w.]+)\)|(\d\d [\w ]+) \(to come\)) \| ([^|]*?) \|"
    in_index, in_readme = re.findall(rows, index, re.M), re.findall(rows, readme(), re.M)
    assert in_index == in_readme
    assert [link for _, link, _, _ in in_index if link] == [path.name for path in LESSONS]


def test_the_console_scripts_exist():
    from daisy.config import COMMANDS
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    entries = dict(re.findall(r'"(daisy-[\w-]+)=daisy\.([\w:]+)"', setup))
    started = {name for name, main in entries.items() if main == "config:run_command"}
    assert started == set(COMMANDS)
    mains = [COMMANDS[name] if name in started else ("daisy." + main.split(":")[0], main.split(":")[1]) for name, main in entries.items()]
    for module, function in [*mains, ("daisy.config", "run_command")]:
        defined = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")).body
        assert function in [node.name for node in defined if isinstance(node, ast.FunctionDef)], f"{module}.{function}"
