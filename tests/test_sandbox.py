"""The sandbox against hostile code, on every back end that works here, and what it makes of honest code."""

import ctypes
import importlib.util
import os
import platform
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from string import Template

import pytest

from atp_rl.scenarios import sandbox
from atp_rl.scenarios.sandbox import Limits, Sandbox, ToolResult
from atp_rl.types import InputError
from tests.hostile_snippets import SNIPPETS, Snippet

SECRET = "hunter2"
MARGIN = 2.0
"""Seconds that a call may last beyond its wall clock."""
PROJECT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no back end works elsewhere")


@pytest.fixture(scope="module", params=["bubblewrap", "sandlock"])
def box(request):
    try:
        return getattr(Sandbox, request.param)()
    except InputError as error:
        pytest.skip(str(error))


class Host:
    """What a snippet may aim at, and the harm that it has done since `renew`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder / "open", folder / "open" / "canary"
        self.signals: list[str] = []
        inherited = folder / "inherited"
        inherited.write_text(SECRET)
        self.fd = os.open(inherited, os.O_RDONLY)
        os.set_inheritable(self.fd, True)
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.stream, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.stream.bind(str(folder / "stream"))
        self.abstract.bind(f"\0atp-{os.getpid()}")
        self.datagram.bind(str(folder / "datagram"))
        for listener in (self.stream, self.abstract):
            listener.listen()
        for channel in (self.tcp, self.udp, self.stream, self.abstract, self.datagram):
            channel.setblocking(False)
        self.names = {
            "CANARY": self.canary,
            "DIR": self.folder,
            "PROJECT": PROJECT,
            "HOME": Path.home(),
            "PARENT": os.getpid(),
            "FD": self.fd,
            "TCP": self.tcp.getsockname()[1],
            "UDP": self.udp.getsockname()[1],
            "STREAM": folder / "stream",
            "DATAGRAM": folder / "datagram",
            "ABSTRACT": f"atp-{os.getpid()}",
        }

    def close(self) -> None:
        os.close(self.fd)
        for channel in (self.tcp, self.udp, self.stream, self.abstract, self.datagram):
            channel.close()

    def code(self, snippet: Snippet) -> str:
        return Template(snippet.code).safe_substitute(self.names)

    def renew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o777)
        self.canary.write_text(SECRET)
        self.canary.chmod(0o666)
        self.signals.clear()
        self.before, self.running = self._state(), {path.name for path in Path("/proc").glob("[0-9]*")}

    def harm(self) -> list[str]:
        harm = [f"signal {name}" for name in self.signals]
        now = self._state()
        harm += [f"{name}: {was} -> {now[name]}" for name, was in self.before.items() if now[name] != was]
        harm += [f"process {pid}" for pid in _children() if pid not in self.running]  # other tests' may come here too
        for listener in (self.tcp, self.stream, self.abstract):
            with suppress(BlockingIOError):
                listener.accept()[0].close()
                harm.append(f"connection to {listener.getsockname()}")
        for channel in (self.udp, self.datagram):
            with suppress(BlockingIOError):
                harm.append(f"message {channel.recv(99)}")
        return harm

    def _state(self) -> dict:
        roots = ("/", ".", "/dev", "/dev/shm", "/run", "/tmp", "/usr", "/var/tmp", sys.base_prefix, Path.home())
        canary = os.stat(self.canary) if self.canary.exists() else None
        limits = (resource.RLIMIT_CORE, resource.RLIMIT_CPU, resource.RLIMIT_AS)
        return {
            "canary": canary and (self.canary.read_text(), canary[:7], canary.st_mtime_ns),
            "folder": sorted(os.listdir(self.folder)) if self.folder.exists() else None,
            "strays": sorted(str(path) for root in roots for path in Path(root).glob("atp-harm-*")),
            "installation": [os.stat(path)[:7] for path in ("/usr", "/usr/lib", os.__file__, sys.base_prefix)],
            "limits": [resource.getrlimit(limit) for limit in limits],
            "priority": os.getpriority(os.PRIO_PROCESS, 0),
            "processors": os.sched_getaffinity(0),
        }


def _children() -> list[str]:
    """Pids of the children of this process, among them the orphans of its children: `host` adopts those."""
    return sorted(pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split())


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    host = Host(tmp_path_factory.mktemp("host"))
    caught = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGIO, signal.SIGURG, signal.SIGXCPU)
    handlers = {s: signal.signal(s, lambda number, _: host.signals.append(signal.Signals(number).name)) for s in caught}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TEST_SECRET", SECRET)
        yield host
    for number, handler in handlers.items():
        signal.signal(number, handler)
    host.close()
    libc.prctl(36, 0)


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="its system calls are numbered for x86_64")


def _cases(snippets):
    return [
        pytest.param(snippet, id=snippet.name, marks=[needs_x86] if "syscall" in snippet.code else [])
        for snippet in snippets
    ]


@pytest.mark.parametrize("snippet", _cases(SNIPPETS))
def test_hostile_code_does_no_harm(box, host, snippet):
    limits = Limits(wall_seconds=0.4) if "timeout" in snippet.status else Limits(memory_mb=128)
    host.renew()
    start = time.monotonic()
    result = box.run(host.code(snippet), limits)
    assert time.monotonic() - start < limits.wall_seconds + MARGIN
    assert host.harm() == []
    assert isinstance(result, ToolResult)
    assert "HARM" not in result.output
    assert SECRET not in result.output
    assert result.status in snippet.status, result
    assert len(result.output) < limits.output_chars + 100
    assert all(c.isprintable() or c in "\n\t" for c in result.output)
    if "escape" in snippet.flags:
        assert result.escape_attempt
    if "no escape" in snippet.flags:
        assert not result.escape_attempt


@pytest.mark.parametrize("snippet", _cases(s for s in SNIPPETS if "works outside" in s.flags))
def test_without_the_sandbox_it_would(host, snippet):
    host.renew()
    command = [sys.executable, "-c", host.code(snippet)]
    done = subprocess.run(command, capture_output=True, text=True, close_fds=False, check=False, timeout=60)
    assert host.harm() or "HARM" in done.stdout or SECRET in done.stdout, done


HONEST = [
    ("print('hi')\nprint(6 * 7)", "hi\n42"),
    ("6 * 7", "42"),
    ("x = 6\nx * 7", "42"),
    ("x = 42", ""),
    ("print(42)", "42"),  # its None is not shown
    ("'a\\n'", r"'a\n'"),  # shown as a notebook does
    ("def f():\n    42\nf()", ""),
    ("if True:\n    42", ""),
    ("", ""),
    ("# nothing", ""),
    ("print('é π 😀 中')", "é π 😀 中"),
    (r"print('a\r\nb\n\n')", "a\nb"),
    (r"print('a\rb\tc\0')", "a\\rb\tc\\x00"),
    (r"print('\ud800')", r"\ud800"),
    ("import sys\nsys.stdout.buffer.write(b'\\xff\\xfe') and None", r"\xff\xfe"),
    ("import sys\nprint('quiet', file=sys.stderr)", ""),  # of a call that did not fail
    ("print(__name__, 'os' in globals())", "__main__ False"),
    ("import sys\nsys.argv, sys.exit()", ""),
    ("from fractions import Fraction\nsum(Fraction(1, n) for n in (2, 3, 6))", "Fraction(1, 1)"),
    ("import pickle\nclass A: x = 42\npickle.loads(pickle.dumps(A())).x", "42"),
    ("import os\nos.getcwd(), os.path.expanduser('~'), sorted(os.environ)[:2]", "('/tmp', '/tmp', ['HOME', 'LC_ALL'])"),
    ("import time\ntime.tzname[0]", "'UTC'"),
    ("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 42\nasyncio.run(f())", "42"),
]
FAILING = [
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("print('so far')\nraise KeyError('k')", "so far\nKeyError: 'k'"),
    ("raise ValueError", "ValueError"),
    (r"raise ValueError('two\nlines')", "ValueError: two lines"),
    ("x = = 1", "SyntaxError: invalid syntax (<tool>, line 1)"),
    ("'\ud800'", "UnicodeDecodeError: "),  # not even source text
    ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    ("input('? ')", "? \nEOFError: EOF when reading a line"),
    ("import sys\nsys.exit('my reason')", "my reason"),
    ("import sys\nsys.exit(3)", "[exit code 3]"),
    ("import os\nos._exit(4)", "[exit code 4]"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("class E(Exception):\n    def __str__(self): return 1\nraise E", "TypeError: "),
    ("import threading\nthreading.Thread(target=print).start()", "RuntimeError: can't start new thread"),
]


@pytest.mark.parametrize(("code", "output"), HONEST)
def test_honest_code(box, code, output):
    result = box.run(code)
    assert (result.output, result.status, result.escape_attempt) == (output, "ok", False)


@pytest.mark.parametrize(("code", "output"), FAILING)
def test_failing_code_shows_the_last_line_of_its_error(box, code, output):
    result = box.run(code)
    assert result.output.startswith(output)
    assert "\n" not in result.output.removeprefix(output)
    assert (result.status, result.escape_attempt) == ("error", False)


LIBRARY = """
import os, bisect, cmath, collections, contextlib, csv, ctypes, datetime, decimal, difflib, enum, functools, glob
import hashlib, heapq, inspect, io, itertools, json, linecache, locale, logging, math, mimetypes, multiprocessing
import numbers, operator, pathlib, pickle, platform, pprint, queue, random, re, secrets, shutil, socket, sqlite3
import ssl, statistics, string, subprocess, tempfile, textwrap, threading, timeit, traceback, types, typing
import unittest, uuid, warnings, zipfile, zlib, zoneinfo

datetime.datetime.now(zoneinfo.ZoneInfo('UTC')), locale.getlocale(), platform.platform(), uuid.uuid4()
os.path.exists('/etc/passwd'), socket.gethostname(), os.cpu_count(), timeit.timeit('0', number=1)
hashlib.sha256(b'').digest(), inspect.getsource(inspect), sqlite3.connect(':memory:'), logging.warning('w')
try: tempfile.TemporaryFile()
except FileNotFoundError: pass
print('done')
"""


def test_the_standard_library_is_no_attempt_to_escape(box):
    result = box.run(LIBRARY)
    assert (result.output, result.status, result.escape_attempt) == ("done", "ok", False)


def test_files_of_its_own(box):
    """Under bubblewrap in /tmp, which is empty at every call; under sandlock nowhere."""
    code = """
import os
print(os.path.exists('atp-harm-own'))
with open('/tmp/atp-harm-own', 'w') as f: print('x', file=f)
open('atp-harm-own').read()"""
    for result in (box.run(code), box.run(code)):
        if box.name == "bubblewrap":
            assert (result.output, result.status) == ("False\n'x\\n'", "ok")
        else:
            refusal = "PermissionError: [Errno 13] Permission denied: '/tmp/atp-harm-own'"
            assert (result.output, result.status) == (f"False\n{refusal}", "error")
        assert not result.escape_attempt


def test_output_is_cut(box):
    limits = Limits(output_chars=10)
    note = "\n[output cut at 10 characters]"
    for code, output in (
        ("print('x' * 10)", "x" * 10),
        ("print('x' * 11)", "x" * 10 + note),
        ("print('x' * 100_000)", "x" * 10 + note),
        (r"print('\n' * 10 + 'x')", "\n" * 10 + note),
        (r"print('\0' * 3)", r"\x00\x00\x" + note),
        ("print('x' * 10)\n1 / 0", "x" * 5 + note + "\nZeroD"),
        ("print('x')\n1 / 0", "x\nZeroD"),
    ):
        result = box.run(code, limits)
        assert result.output == output
        assert result.status == ("error" if "1 / 0" in code else "ok")


def test_what_was_printed_before_the_end_is_kept(box):
    result = box.run("import time\nprint('before')\ntime.sleep(9)", Limits(wall_seconds=0.3))
    assert (result.output, result.status) == ("before\n[stopped after 0.3 s]", "timeout")
    assert 0.3 <= result.seconds < 0.3 + MARGIN
    result = box.run("print('before')\nimport ctypes\nctypes.string_at(0)")
    assert (result.output, result.status) == ("before\n[ended by SIGSEGV]", "error")
    result = box.run("print('before')\nx = [0]\nwhile True: x += x")
    assert (result.output, result.status) == ("before\nMemoryError", "memory")


def test_the_processor_has_a_clock_of_its_own(box):
    result = box.run("while True: pass", Limits(wall_seconds=120, cpu_seconds=1))
    assert (result.output, result.status) == ("[stopped after 1 s of processor time]", "timeout")
    assert result.seconds < 100  # on a busy machine


def test_calls_repeat_themselves(box):
    code = "print(hash('a'), list({'a', 'b', 'c', 'd', 'e'}))"
    assert box.run(code).output == box.run(code).output


def test_many_keep_their_order_and_equal_ones_run_once(box):
    chance = "import os\nos.urandom(8)"
    results = box.run_many(["import time\ntime.sleep(0.2)\n'slow'", chance, "1 / 0", chance, "'fast'"])
    assert [r.output for r in results[::2]] == ["'slow'", "ZeroDivisionError: division by zero", "'fast'"]
    assert results[1] is results[3]
    assert results[1].output != box.run(chance).output
    assert box.run_many([]) == []


def test_many_do_not_disturb_each_other(box):
    hostile = [
        "import os\nos.write(1, b'x' * 10**7)",
        "x = [0]\nwhile True: x += x",
        "import os\nos.kill(-1, 9)",
        "1 / 0",
    ]
    honest = [f"import time\ntime.sleep(0.1)\nprint({n})" for n in range(4)]
    results = box.run_many([code for pair in zip(honest, hostile, strict=True) for code in pair])
    assert [r.output for r in results[::2]] == ["0", "1", "2", "3"]
    assert [r.status for r in results[1::2]] == ["output", "memory", "error", "error"]


def test_a_sandbox_that_does_not_start_is_no_result(box):
    with pytest.raises(RuntimeError, match=rf"(?s){box.name} did not start .*MemoryError"):
        box.run("1", Limits(memory_mb=1))


def test_it_dies_with_its_parent(box, host):
    host.renew()
    program = (
        f"from atp_rl.scenarios.sandbox import Limits, Sandbox\nbox = Sandbox.{box.name}()\nprint(flush=True)\n"
        "box.run('import time; time.sleep(60)', Limits(wall_seconds=60))"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        parent.stdout.readline()
        time.sleep(1)  # until it sleeps
        parent.kill()
    deadline = time.monotonic() + MARGIN
    while harm := host.harm():
        assert time.monotonic() < deadline, harm
        for pid in _children():
            os.waitpid(int(pid), os.WNOHANG)


def test_find_takes_what_works_and_says_what_does_not(box, monkeypatch):
    Sandbox.find.cache_clear()
    if box.name == "sandlock":
        monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    found = Sandbox.find()
    assert found.name == box.name
    assert Sandbox.find() is found
    Sandbox.find.cache_clear()


def test_find_refuses_when_nothing_works(monkeypatch):
    Sandbox.find.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"(?s)no program bwrap.*no package sandlock.*apt-get install bubblewrap.*pip install sandlock"
    ):
        Sandbox.find()
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    with pytest.raises(InputError, match=r"bubblewrap did not start \(exit code 1\)"):
        Sandbox.find()


def test_a_back_end_that_shows_the_host_is_not_trusted(box):
    if box.name == "bubblewrap":
        leaky = Sandbox(box.name, [*box._command[:-3], "--ro-bind", "/etc", "/etc", *box._command[-3:]], None)
    else:
        leaky = Sandbox(box.name, [], (box._landlock[0], ["/"]))
    with pytest.raises(InputError, match=f"{box.name}: a probe answered"):
        leaky._probed()


ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


@pytest.mark.parametrize(
    ("machine", "architecture", "calls"),
    [
        (
            "x86_64",
            0xC000003E,
            {"read": 0, "socket": 41, "clone": 56, "execve": 59, "kill": 62, "fcntl": 72, "ptrace": 101, "chmod": 90},
        ),
        (
            "aarch64",
            0xC00000B7,
            {
                "read": 63,
                "socket": 198,
                "clone": 220,
                "execve": 221,
                "kill": 129,
                "fcntl": 25,
                "ptrace": 117,
                "chmod": 53,
            },
        ),
    ],
)
def test_the_filter_of_each_machine(machine, architecture, calls):
    def verdict(number, *args, architecture=architecture):
        """What the kernel would do: the program run on a `struct seccomp_data`."""
        program = [struct.unpack("=HBBI", program_bytes[i : i + 8]) for i in range(0, len(program_bytes), 8)]
        data = struct.pack("=iIQ6Q", number, architecture, 0, *args, *[0] * (6 - len(args)))
        at, value = 0, 0
        while True:
            code, if_true, if_false, k = program[at]
            at += 1
            match code:
                case 0x20:
                    (value,) = struct.unpack_from("=I", data, k)
                case 0x15 | 0x35:
                    at += if_true if (value == k if code == 0x15 else value >= k) else if_false
                case _:
                    return k

    program_bytes = sandbox._filter(machine)
    assert len(program_bytes) // 8 < 4096  # the kernel's limit
    assert verdict(calls["read"]) == ALLOW
    assert verdict(calls["fcntl"], 0, 3) == ALLOW
    assert verdict(calls["fcntl"], 0, 8) == EPERM  # F_SETOWN
    assert {verdict(calls[name]) for name in ("socket", "clone", "execve", "kill", "chmod")} == {EPERM}
    assert verdict(calls["ptrace"]) == verdict(calls["read"], architecture=0x40000003) == KILL
    assert verdict(435) == verdict(9999) == ENOSYS  # clone3


def test_a_machine_without_a_filter_is_refused():
    with pytest.raises(InputError, match="riscv64"):
        sandbox._filter("riscv64")
