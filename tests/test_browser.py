"""Lessons as their reader meets them: JupyterLab in a real browser, Run All Cells, a slider moved.

Needs Chromium (Debian: apt-get install chromium) and `pip install -e '.[browser]'`. All of it takes minutes:
`pytest -m slow tests/test_browser.py`, one lesson with `-k 05_rope`. DAISY_SCREENSHOTS=folder keeps a picture of each.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
                  "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SETTINGS = {  # no question about news; every cell drawn, so that a slider far down exists
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
LESSON_S = 300  # more than five times what a lesson may take


def wait_for(condition, timeout_s, what):
    "Poll until `condition()` is true, and return what it gave."
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition(): return found
        time.sleep(0.5)
    pytest.fail(f"{what}: not within {timeout_s} s")


def answers(url) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory):
    "JupyterLab serving a copy of the lessons, with settings of its own; gives its address and the folder."
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", root)
    for name, values in SETTINGS.items():
        path = root / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(root / "config"), "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
           "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
               "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={root}"]
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: server.poll() is not None or answers(f"{address}/api"), 200, "JupyterLab starts")
        assert server.poll() is None, (root / "log").read_text()[-2000:]
        yield address, root
    finally:
        server.terminate()
        server.wait(timeout=100)


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None: pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, request):
    page = chromium.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    yield page
    if folder := os.environ.get("DAISY_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{request.node.callspec.params['name']}.png")
    page.close()


def run_all(page):
    "The menu's Run All Cells, once the kernel is there: before that, JupyterLab loses it."
    page.locator(".jp-StatusBar-Widget", has_text="| Idle").first.wait_for()
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()


def saved_cells(page, path) -> list[dict]:
    "The code cells of the notebook as JupyterLab now saves it."
    page.keyboard.press("Control+s")
    page.wait_for_timeout(500)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]


def errors_of(cells) -> list[str]:
    return [f"{output['ename']}: {output['evalue']}\n{''.join(cell['source'])}"
            for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


def stop_kernels(address):
    "A kernel holds torch and a lesson's tensors; none is needed after its lesson."
    for kernel in json.load(urllib.request.urlopen(f"{address}/api/kernels")):
        urllib.request.urlopen(urllib.request.Request(f"{address}/api/kernels/{kernel['id']}", method="DELETE"))


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_run_all_cells(name, jupyterlab, tab):
    (address, root), page = jupyterlab, tab
    path = root / "nbs" / f"{name}.ipynb"
    page.goto(f"{address}/lab/tree/nbs/{path.name}?reset")
    run_all(page)

    def finished():
        cells = saved_cells(page, path)
        return cells if errors_of(cells) or all(cell["execution_count"] for cell in cells) else None

    cells = wait_for(finished, LESSON_S, f"{name} runs to its end")
    assert not errors_of(cells), errors_of(cells)[0]
    if any("interact(" in "".join(cell["source"]) and "Slider(" in "".join(cell["source"]) for cell in cells):
        move_a_slider(page)
    stop_kernels(address)


def move_a_slider(page):
    "The first slider of a lesson redraws its own picture."
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.scroll_into_view_if_needed()
    figure = page.locator(".jp-OutputArea", has=handle).first.locator(".widget-output img").first
    before = figure.get_attribute("src")
    handle.press("ArrowRight")
    try:
        wait_for(lambda: figure.get_attribute("src") != before, 15, "the picture follows the slider")
    except pytest.fail.Exception:
        handle.press("ArrowLeft")  # it may have stood at its right end
        wait_for(lambda: figure.get_attribute("src") != before, 15, "the picture follows the slider")
