"""The whole download script against a hub on this machine that hangs up, refuses, stalls and lies."""
import ast
import contextlib
import email.utils
import hashlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from daisy import shards
from daisy.shards import FINEWEB_PATH, HEADER_BYTES, MAGIC, ShardError, download_fineweb, fineweb_names, read_shard

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "cached_fineweb100B.py"
VAL, ONE, TWO, THREE = fineweb_names(3)


def shard_bytes(tokens, magic=MAGIC, version=1, count=None):
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count).ljust(HEADER_BYTES, b"\0")
    return header + np.asarray(tokens, dtype="<u2").tobytes()


def some_tokens(name, num_tokens=3000):
    return np.random.default_rng(list(name.encode())).integers(0, 50_257, num_tokens)


class Hub(ThreadingHTTPServer):
    "Serves `files`; `plan[name]` lists what the next requests for a name meet, after which all goes well."
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, redirect=False):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {name: shard_bytes(some_tokens(name)) for name in (VAL, ONE, TWO, THREE)}
        self.plan, self.asked, self.redirect, self.release = {}, [], redirect, threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def starts(self, name):
        "Where each request for `name` asked to begin."
        return [start for asked, start in self.asked if asked == name]

    def handle_error(self, *_): pass  # a client that has gone


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, name = self.server, self.path.rpartition("/")[2]
        if self.path == f"/{FINEWEB_PATH}/{name}" and hub.redirect:
            return self.answer(302, {"Location": f"/store/{name}", "X-Linked-ETag": f'"{hub.redirect(hub.files[name])}"'})
        assert self.path in (f"/{FINEWEB_PATH}/{name}", f"/store/{name}"), self.path
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        hub.asked.append((name, start))
        steps = hub.plan.get(name, [])
        step, *values = steps.pop(0) if steps else ("serve",)
        data = hub.files.get(name)
        if step == "status": return self.answer(*values)
        if data is None: return self.answer(404)
        if step == "instead": data = values[0]
        if step in ("whole", "instead"): start = 0
        if start >= len(data) and start: return self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if step != "unsized": self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if step == "cut": data = data[:values[0]]
        if step == "stall": self.send_slowly(data[:values[0]], start)
        elif step == "trickle": self.send_a_little_at_a_time(data[start:])
        else: self.wfile.write(data[start:])

    def send_slowly(self, data, start):
        self.wfile.write(data[start:])
        self.wfile.flush()
        self.server.release.wait(150)

    def send_a_little_at_a_time(self, data):
        for begin in range(0, len(data), 100):
            self.wfile.write(data[begin:begin + 100])
            if self.server.release.wait(0.2): return

    def answer(self, code, headers={}):
        self.send_response(code)
        for key, value in {"Content-Length": "0", **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_): pass


@contextlib.contextmanager
def serving(hub):
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.release.set()
        hub.shutdown()
        hub.server_close()


@pytest.fixture
def hub():
    with serving(Hub()) as hub:
        yield hub


def command(hub, folder, *arguments, backoff="0.02", address=None):
    environment = {**os.environ, "HF_ENDPOINT": address or hub.address, "no_proxy": "127.0.0.1",
                   "PYTHONPATH": str(ROOT)}
    return dict(args=[sys.executable, str(SCRIPT), *map(str, arguments), "--folder", str(folder), "--backoff-s", backoff],
                env=environment, text=True, cwd=ROOT)


def download(hub, folder, *arguments, **options):
    return subprocess.run(**command(hub, folder, *arguments, **options), capture_output=True, timeout=200)


def said(done):
    "The one line of a failed run, its progress bar and its code set aside."
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and not line.startswith("FineWeb:")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def whole(folder, hub, *names):
    "All of `names` are there, equal to the hub's, and nothing else is."
    assert sorted(file.name for file in folder.iterdir()) == sorted([".lock", *names])
    return all((folder / name).read_bytes() == hub.files[name] for name in names)


def shards_in(folder):
    return sorted(file.name for file in folder.glob("*.bin"))


# what goes well

def test_validation_and_training_shards_come_with_a_bar(hub, tmp_path):
    done = download(hub, tmp_path / "a" / "b", 2)
    assert done.returncode == 0, done.stderr
    assert whole(tmp_path / "a" / "b", hub, VAL, ONE, TWO)
    assert done.stdout == f"3 shards, 9,000 tokens, in {tmp_path / 'a' / 'b'}\n"
    assert "FineWeb: 100%" in done.stderr and "21.1k" in done.stderr  # 3 × 7,024 bytes
    assert read_shard(tmp_path / "a" / "b" / TWO, 50_257).tolist() == some_tokens(TWO).tolist()


def test_complete_shards_are_skipped_and_broken_ones_replaced(hub, tmp_path):
    assert download(hub, tmp_path, 2, "--quiet").returncode == 0
    (tmp_path / ONE).write_bytes(hub.files[ONE][:-2])
    hub.asked.clear()
    done = download(hub, tmp_path, 3, "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(hub.asked) == [(ONE, 0), (THREE, 0)] and whole(tmp_path, hub, VAL, ONE, TWO, THREE)


def test_the_hub_redirects_to_its_store_and_names_a_sha256(tmp_path):
    with serving(Hub(redirect=lambda data: hashlib.sha256(data).hexdigest())) as hub:
        hub.plan[ONE] = [("cut", 2000)]
        assert download(hub, tmp_path, 1).returncode == 0
        assert whole(tmp_path, hub, VAL, ONE) and hub.starts(ONE) == [0, 2000]


def test_shards_come_in_parallel(hub, tmp_path):
    "Each of four stalls until released; that happens once all four have been asked for."
    hub.plan = {name: [("stall", 1500)] for name in (VAL, ONE, TWO, THREE)}
    with subprocess.Popen(**command(hub, tmp_path, 3, "--threads", 4, "--quiet")) as running:
        wait_until(lambda: len(hub.asked) == 4)
        hub.release.set()
        assert running.wait(120) == 0
    assert whole(tmp_path, hub, VAL, ONE, TWO, THREE) and hub.starts(VAL) == [0, 1500]


def test_without_content_length(hub, tmp_path):
    hub.plan[VAL] = [("unsized",)]
    assert download(hub, tmp_path, 1).returncode == 0 and whole(tmp_path, hub, VAL, ONE)


# what may pass

def test_cut_connections_resume_by_range(hub, tmp_path):
    hub.plan = {VAL: [("cut", 0), ("cut", 10), ("cut", 2000), ("cut", 7023)], ONE: [("cut", 1024)]}
    assert download(hub, tmp_path, 1).returncode == 0
    assert whole(tmp_path, hub, VAL, ONE)
    assert hub.starts(VAL) == [0, 0, 10, 2000, 7023] and hub.starts(ONE) == [0, 1024]


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_passing_answers_are_tried_again(hub, tmp_path, code):
    hub.plan[ONE] = [("status", code)] * 2
    assert download(hub, tmp_path, 1).returncode == 0
    assert whole(tmp_path, hub, VAL, ONE) and len(hub.starts(ONE)) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(hub, tmp_path, form):
    after = "1" if form == "seconds" else email.utils.formatdate(time.time() + 3, usegmt=True)
    hub.plan[ONE] = [("status", 429, {"Retry-After": after})]
    begin = time.monotonic()
    assert download(hub, tmp_path, 1, backoff="0").returncode == 0
    assert time.monotonic() - begin > 1 and whole(tmp_path, hub, VAL, ONE)


def test_a_server_that_ignores_range_starts_over(hub, tmp_path):
    hub.plan[ONE] = [("cut", 4000), ("whole",)]
    assert download(hub, tmp_path, 1).returncode == 0
    assert whole(tmp_path, hub, VAL, ONE) and hub.starts(ONE) == [0, 4000]


def test_a_stalled_connection_is_left_and_resumed(hub, tmp_path):
    hub.plan[ONE] = [("stall", 3000)]
    begin = time.monotonic()
    assert download(hub, tmp_path, 1, "--timeout-s", 0.3).returncode == 0
    assert time.monotonic() - begin < 120  # the stall lasts longer
    assert whole(tmp_path, hub, VAL, ONE) and hub.starts(ONE) == [0, 3000]


def test_progress_forgives_failures(hub, tmp_path):
    hub.plan[ONE] = [("cut", 1000 * i) for i in range(1, 7)]
    assert download(hub, tmp_path, 1, "--retries", 1).returncode == 0 and whole(tmp_path, hub, VAL, ONE)


def test_enough_is_enough(hub, tmp_path):
    hub.plan[ONE] = [("cut", 2500)] + [("status", 503)] * 9
    line = said(download(hub, tmp_path, 1, "--retries", 2))
    assert ONE in line and "503" in line and "3 tries" in line and "same command" in line
    assert (tmp_path / f"{ONE}.part").stat().st_size == 2500 and not (tmp_path / ONE).exists()
    hub.plan.clear()
    assert download(hub, tmp_path, 1).returncode == 0
    assert whole(tmp_path, hub, VAL, ONE) and hub.starts(ONE)[-1] == 2500


# what doesn't pass

@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_shard_that_is_not_to_be_had(hub, tmp_path, code):
    hub.plan[TWO] = [("status", code)]
    line = said(download(hub, tmp_path, 2))
    assert TWO in line and str(code) in line and len(hub.starts(TWO)) == 1
    assert TWO not in shards_in(tmp_path)


WRONG = {
    "page": (b"<html>terms and conditions</html>" * 300, "not a shard"),
    "empty": (b"", "empty"),
    "half a header": (shard_bytes([1])[:500], "less than the header's"),
    "magic": (shard_bytes([1, 2], magic=7), "begins with 7"),
    "version": (shard_bytes([1, 2], version=3), "version 3"),
    "header counts more": (shard_bytes([1, 2], count=3), "cut short"),
    "header counts less": (shard_bytes([1, 2], count=1), "too long"),
    "odd": (shard_bytes([1, 2])[:-1], "odd number"),
    "other vocabulary": (shard_bytes([1, 50_257]), "beyond the vocabulary"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_bytes_are_named_and_deleted(hub, tmp_path, kind):
    data, reason = WRONG[kind]
    hub.files[ONE] = data
    line = said(download(hub, tmp_path, 1, "--threads", 1))
    assert ONE in line and reason in line
    assert shards_in(tmp_path) == [VAL] and not (tmp_path / f"{ONE}.part").exists()


def test_a_wrong_sha256_is_noticed(tmp_path):
    with serving(Hub(redirect=lambda data: "0" * 64)) as hub:
        assert "sha256" in said(download(hub, tmp_path, 1)) and shards_in(tmp_path) == []


@pytest.mark.parametrize("left", [b"<html>" * 100, b"\xff" * 100_000], ids=["shorter", "longer"])
def test_a_wrong_part_of_an_earlier_run_is_fetched_anew(hub, tmp_path, left):
    (tmp_path / f"{ONE}.part").write_bytes(left)
    assert download(hub, tmp_path, 1).returncode == 0
    assert whole(tmp_path, hub, VAL, ONE) and hub.starts(ONE) == [len(left), 0]


def test_a_finished_part_only_needs_its_name(hub, tmp_path):
    (tmp_path / f"{ONE}.part").write_bytes(hub.files[ONE])
    assert download(hub, tmp_path, 1).returncode == 0 and whole(tmp_path, hub, VAL, ONE)


def test_no_network(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    line = said(download(None, tmp_path, 3, address=address))
    assert "no network" in line and address in line and "refused" in line
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_no_such_host(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ShardError, match="no network.* https://huggingface.co can't be reached.*Name or service"):
        download_fineweb(1, tmp_path, backoff_s=0, progress=False)
    assert shards_in(tmp_path) == []


@pytest.mark.parametrize("address", ["huggingface.co", "file:///etc", "https://", "http://a b"])
def test_an_endpoint_that_is_no_address(tmp_path, address):
    assert f"HF_ENDPOINT={address}" in said(download(None, tmp_path, 1, address=address))


def test_a_disk_that_refuses(hub, tmp_path):
    (tmp_path / "file").write_text("")
    assert "can't be written" in said(download(hub, tmp_path / "file" / "folder", 1))
    (tmp_path / ONE).mkdir()
    assert ONE in said(download(hub, tmp_path, 1)) and (tmp_path / f"{ONE}.part").exists()


def test_a_full_disk_keeps_the_part(hub, tmp_path, monkeypatch):
    def full(file, block):
        raise OSError(28, "No space left on device")
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(shards, "_append", full)
    with pytest.raises(ShardError, match="No space left"):
        download_fineweb(1, tmp_path, progress=False)
    assert shards_in(tmp_path) == [] and len(hub.asked) <= 2


# interrupted

def wait_until(condition, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.02)


def interrupted(hub, folder, number, *arguments):
    "Start, wait for the first 3,000 bytes of two shards, send the signal; returns exit code and what was said."
    hub.plan = {name: [("stall", 3000)] for name in (VAL, ONE)}
    running = subprocess.Popen(**command(hub, folder, 1, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    parts = [folder / f"{name}.part" for name in (VAL, ONE)]
    wait_until(lambda: all(part.exists() and part.stat().st_size == 3000 for part in parts))
    running.send_signal(number)
    _, stderr = running.communicate(timeout=200)
    assert shards_in(folder) == []
    return running.returncode, stderr


def test_resume_after_sigkill(hub, tmp_path):
    assert interrupted(hub, tmp_path, signal.SIGKILL)[0] == -signal.SIGKILL
    assert download(hub, tmp_path, 1).returncode == 0
    assert whole(tmp_path, hub, VAL, ONE) and hub.starts(VAL) == hub.starts(ONE) == [0, 3000]


def test_ctrl_c_leaves_cleanly(hub, tmp_path):
    code, stderr = interrupted(hub, tmp_path, signal.SIGINT, "--timeout-s", 1, "--quiet")
    assert code == 130 and "Traceback" not in stderr and stderr.count("\n") == 1 and "stopped" in stderr
    assert download(hub, tmp_path, 1).returncode == 0 and hub.starts(ONE) == [0, 3000]


def test_ctrl_c_does_not_wait_for_a_slow_shard(hub, tmp_path):
    "At 500 bytes a second the 7,024 would take 14 s."
    hub.plan = {name: [("trickle",)] for name in (VAL, ONE)}
    running = subprocess.Popen(**command(hub, tmp_path, 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = tmp_path / f"{VAL}.part"
    wait_until(lambda: part.exists() and part.stat().st_size)
    begin = time.monotonic()
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=200)
    assert running.returncode == 130 and time.monotonic() - begin < 12 and shards_in(tmp_path) == []


def test_one_failure_stops_the_others_also_while_they_wait(hub, tmp_path):
    hub.plan = {VAL: [("status", 429, {"Retry-After": "150"})], ONE: [("status", 404)]}
    begin = time.monotonic()
    assert ONE in said(download(hub, tmp_path, 1, "--threads", 2))
    assert time.monotonic() - begin < 120 and shards_in(tmp_path) == []


def test_a_second_download_into_the_folder_is_turned_away(hub, tmp_path):
    hub.plan = {name: [("stall", 3000)] for name in (VAL, ONE)}
    with subprocess.Popen(**command(hub, tmp_path, 1, "--quiet"), stdout=subprocess.PIPE) as running:
        wait_until(lambda: len(hub.asked) == 2)
        assert "another download" in said(download(hub, tmp_path, 1))
        hub.release.set()
        assert running.wait(120) == 0
    assert whole(tmp_path, hub, VAL, ONE)


# the command line

def test_help_names_every_option_and_the_endpoint(tmp_path):
    done = download(None, tmp_path, "--help", address="http://127.0.0.1:9")
    assert done.returncode == 0 and done.stderr == ""
    for word in ("HF_ENDPOINT", "103", "1030", "data/fineweb", "--threads", "--retries", "--backoff-s", "--timeout-s"):
        assert word in done.stdout


@pytest.mark.parametrize("n", ["0", "1031", "-1", "ten", "1.5"])
def test_n_is_checked(tmp_path, n):
    done = download(None, tmp_path / "x", n, address="http://127.0.0.1:9")
    assert done.returncode == 2 and "usage" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", [("--threads", 0), ("--retries", -1), ("--timeout-s", 0), ("--backoff-s", "nan")])
def test_options_are_checked(tmp_path, option):
    done = subprocess.run([sys.executable, str(SCRIPT), "1", "--folder", str(tmp_path / "x"), *map(str, option)],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert option[0][2:].replace("-", "_") in said(done) and not (tmp_path / "x").exists()


def test_a_glob_of_fineweb_that_matches_nothing_names_the_script():
    with pytest.raises(ShardError, match="cached_fineweb100B.py"):
        shards.shard_files("data/no/fineweb_train_*.bin")


def test_the_script_only_calls_the_package():
    docstring, *body = ast.parse(SCRIPT.read_text(encoding="utf-8")).body
    assert [type(node) for node in body] == [ast.Import, ast.ImportFrom, ast.If]
