"""Runs a model's Python as a tool, one fresh interpreter a call. The code is hostile until it has ended.

Nothing is judged by reading the code; what it must not do, it cannot do. It is confined twice:

* The *back end* hides the host. `bubblewrap` gives it namespaces of its own: no network, no other process, and of the
  files only /usr and the interpreter (read-only) and an empty /tmp that ends with the call. `sandlock` (Landlock)
  leaves it among the host's files and lets it open none but those two; it can write nothing, and still sees the size
  and date of a file whose path it guesses.
* The interpreter then gives up its own rights before it looks at the code (`_inside`, the same for both): no
  capabilities, resource limits, and a seccomp filter that lets through only the system calls that computing needs. So
  there are no sockets, no programs, no signals, and the one task that runs can start neither a process nor a thread:
  there is no tree to hunt down, and the memory limit of one process is the limit of all.

Environment, locale, time zone and hash seed are fixed, so a call repeats itself unless it asks the clock or for chance.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import platform
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from atp_rl.types import InputError

Status = Literal["ok", "error", "timeout", "memory", "output"]
"""How a call ended: `error` is an exception, an exit code or a crash; `timeout` is the wall clock's or the processor's;
`memory` an uncaught MemoryError; `output` a call that was stopped because it wrote without end."""


@dataclass(frozen=True)
class Limits:
    wall_seconds: float = 5.0
    """From the moment the code starts; starting the sandbox does not count."""
    cpu_seconds: int = 3
    memory_mb: int = 256
    """Address space of the interpreter, which needs 20 of it for itself (40 under sandlock)."""
    output_chars: int = 2000
    """What is kept of what the code says; more than that is no error."""


@dataclass(frozen=True)
class ToolResult:
    output: str
    """What the code printed and, if it failed, the last line of its error; line breaks at the end are dropped. At most
    `output_chars`, and the notes in brackets that say what was cut and why it was stopped. Whatever is not printable
    (control characters, invalid UTF-8) is written as its escape."""
    status: Status
    escape_attempt: bool
    """Whether the code tried to leave the sandbox: to open, list or change files of the host (/etc, /home, /proc, ...),
    to change the installation, to open a socket or look up a host, to start or signal a process, or to make a system
    call that only an attack makes. What a library tries on its behalf counts too. Told by the interpreter's audit
    events, which code that means to can evade, and by the kernel, which it cannot. No attempt succeeds either way."""
    seconds: float
    """Wall time that the code took."""


_PYTHON = os.path.realpath(sys._base_executable)  # pyright: ignore  # of a venv, what it was made with
_PREFIX = os.path.realpath(sys.base_prefix)
_INSTALLED = [] if Path(_PREFIX).is_relative_to("/usr") else [_PYTHON, f"{_PREFIX}/lib", f"{_PREFIX}/lib64"]
"""What the interpreter needs outside of /usr; not all of its prefix, which may be somebody's home."""
_LIBRARIES = [Path("/", name) for name in ("bin", "lib", "lib32", "lib64", "libx32", "sbin")]
_LOADER_CACHE = "/etc/ld.so.cache"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_FILES_BYTES = 16 << 20
"""Size of /tmp under bubblewrap, and of any one file."""
_OUTPUT_BYTES = 1 << 20
"""The code is stopped when it has written more, on standard output and error together."""
_START_SECONDS = 30.0
"""For the sandbox to start; a matter of milliseconds, unless the machine is overloaded."""
# -I would be -E -P -s, and -E ignores PYTHONHASHSEED; this environment holds nothing else that need be ignored.
_FLAGS = ("-P", "-s", "-S", "-B", "-c")
_ENVIRONMENT = {"HOME": "/tmp", "LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
_READY, _ESCAPE = b"\0ready\n", b"\0escape\n"
"""What `_inside` writes to standard error for us to read: the code starts now; it tries to leave."""


class Sandbox:
    """One way of running untrusted Python; stateless, so threads may share it."""

    def __init__(self, name: str, command: Sequence[str], landlock: tuple[str, list[str]] | None) -> None:
        """For `bubblewrap`, `sandlock` and `find`.

        Args:
            command: What the interpreter's command line is appended to.
            landlock: Where the package sandlock is, and the paths that may be read; None for no Landlock.
        """
        self.name = name
        self._command = list(command)
        self._landlock = landlock
        self._filter = _filter(platform.machine())

    @classmethod
    @cache
    def find(cls) -> Sandbox:
        """The first back end that works here, tried by running a snippet; later calls return the same.

        Raises:
            InputError: None works; says why, and what to install.
        """
        reasons: list[str] = []
        for back_end in (cls.bubblewrap, cls.sandlock):
            try:
                return back_end()
            except InputError as error:
                reasons.append(f"  {error}")
        raise InputError(
            "running a model's Python needs a sandbox, and none works here:\n"
            + "\n".join(reasons)
            + "\nInstall bubblewrap >= 0.7 (Debian, Ubuntu: apt-get install bubblewrap; it needs user namespaces), "
            "or sandlock (pip install sandlock; it needs Linux >= 6.7 with Landlock)."
        )

    @classmethod
    def bubblewrap(cls) -> Sandbox:
        """Raises InputError if it does not work here."""
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise InputError("bubblewrap: no program bwrap")
        command = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        # Pid 1 of the namespace is then the interpreter, for which bwrap waits; it leaves a pid 1 of its own a zombie.
        command += ["--as-pid-1", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
        command += ["--size", str(_FILES_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp", "--ro-bind", "/usr", "/usr"]
        for path in _LIBRARIES:
            if path.is_symlink():
                command += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                command += ["--ro-bind", str(path), str(path)]
        for path in (*_INSTALLED, _LOADER_CACHE):
            command += ["--ro-bind-try", path, path]
        for device in _DEVICES:
            command += ["--dev-bind", device, device]
        # Neither /proc nor /dev/pts nor /sys: Python needs none, and a fresh /proc may not be mounted in a container.
        return cls("bubblewrap", [*command, "--remount-ro", "/", "--"], None)._probed()

    @classmethod
    def sandlock(cls) -> Sandbox:
        """Raises InputError if it does not work here."""
        spec = importlib.util.find_spec("sandlock")
        if spec is None or spec.origin is None:
            raise InputError("sandlock: no package sandlock")
        readable = ["/usr", *map(str, _LIBRARIES), *_INSTALLED, _LOADER_CACHE, *_DEVICES]
        package = str(Path(spec.origin).parents[1])
        return cls("sandlock", [], (package, [path for path in readable if os.path.exists(path)]))._probed()

    def run(self, code: str, limits: Limits = Limits()) -> ToolResult:
        """Run `code` as a module `__main__`; if its last statement is an expression, its value is printed too.

        Raises:
            RuntimeError: The sandbox itself did not start. Whatever the code does is a result.
        """
        with os.fdopen(os.memfd_create("code"), "wb+") as stdin:
            stdin.write(code.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            process = subprocess.Popen(
                [*self._command, _PYTHON, *_FLAGS, self._source(limits)],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,  # of bwrap too: none of ours may be found in any process of the sandbox
                cwd="/tmp",
                start_new_session=True,
            )
        try:
            said = _drained(process, limits)
        finally:
            _end(process)
        if said.started is None:
            tail = said.stderr.decode(errors="replace").strip()[-500:]
            raise RuntimeError(f"{self.name} did not start (exit code {process.returncode}): {tail}")
        return _result(said, process.returncode, limits)

    def run_many(self, codes: Sequence[str], limits: Limits = Limits()) -> list[ToolResult]:
        """`run` as many at a time as there are processors; in order. Equal codes are run once and share the result."""
        different = list(dict.fromkeys(codes))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            results = dict(zip(different, pool.map(lambda code: self.run(code, limits), different), strict=True))
        return [results[code] for code in codes]

    def _source(self, limits: Limits) -> str:
        """The program that the interpreter is given: `_inside`, called."""
        arguments = {
            "seccomp": self._filter,
            "memory": limits.memory_mb << 20,
            "cpu": limits.cpu_seconds,
            "file": _FILES_BYTES,
            "landlock": self._landlock,
            "parent": os.getpid() if self._landlock else 0,  # bwrap is outside of the namespace
        }
        return f"{_SOURCE}\n_inside(**{arguments!r})"

    def _probed(self) -> Sandbox:
        try:
            result = self.run("try:\n    print(open('/etc/passwd').read())\nexcept OSError:\n    pass\n6 * 7")
        except (RuntimeError, OSError) as error:
            raise InputError(f"{self.name}: {error}") from error
        if result.output != "42":
            raise InputError(f"{self.name}: a probe answered {result.output[:200]!r} ({result.status})")
        return self


def _inside(
    seccomp: bytes, memory: int, cpu: int, file: int, landlock: tuple[str, list[str]] | None, parent: int
) -> None:
    """In the sandboxed interpreter: give up all rights, then run the code from standard input. Sent there as source."""
    import _ast  # the module ast takes 8 ms to import, and this is what we need of it
    import ctypes
    import os
    import resource
    import struct
    import sys

    source = sys.stdin.buffer.read()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    if landlock:
        package, readable = landlock
        sys.path.append(package)
        import sandlock

        # The scopes need Linux 6.12; the filter below denies signals and sockets on any.
        scopes = [sandlock.Protection.SIGNAL_SCOPE, sandlock.Protection.ABSTRACT_UNIX_SOCKET_SCOPE]
        sandlock.confine(sandlock.Sandbox(fs_readable=readable, fs_writable=["/dev/null"], allow_degraded=scopes))
        sys.path.remove(package)

    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: cpu, resource.RLIMIT_FSIZE: file}
    for what, value in (limits | {resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0}).items():
        most = resource.getrlimit(what)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(what, (value, value))

    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *args: object) -> None:
        if getattr(libc, function)(*args) != 0:
            raise OSError(ctypes.get_errno(), f"{function}{args}")

    def prctl(option: int, *args: int) -> None:
        call("prctl", option, *map(ctypes.c_ulong, (*args, 0, 0, 0, 0)[:4]))

    prctl(1, 9)  # PR_SET_PDEATHSIG: die with the parent, by SIGKILL
    if os.getppid() != parent:
        raise SystemExit("the parent has died")
    prctl(4, 0)  # PR_SET_DUMPABLE: no core, and none of the host's core handlers
    call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))  # all three sets of capabilities are empty
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    program = ctypes.create_string_buffer(seccomp, len(seccomp))
    sock_fprog = ctypes.create_string_buffer(struct.pack("HP", len(seccomp) // 8, ctypes.addressof(program)))
    prctl(22, 2, ctypes.addressof(sock_fprog))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

    forbidden = {
        *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn"),
        *("os.kill", "os.killpg", "resource.prlimit", "socket.bind", "socket.connect", "socket.sendto"),
        *("socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname", "socket.getnameinfo"),
    }
    writes = {"chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate", "utime"}
    touches = {"open", "os.chdir", "os.listdir", "os.scandir", *(f"os.{name}" for name in writes)}
    installed = (os.path.realpath(sys.prefix) + "/", "/usr/")
    hidden = ("/boot/", "/dev/", "/etc/", "/home/", "/proc/", "/root/", "/run/", "/sys/", "/var/")
    # What the standard library opens of its own accord: tempfile, zoneinfo, mimetypes, platform.
    harmless = ("/dev/null/", "/dev/zero/", "/dev/full/", "/dev/random/", "/dev/urandom/", "/usr/tmp/", "/var/tmp/")
    harmless += ("/etc/localtime/", "/etc/mime.types/", "/etc/os-release/")
    absolute, real, write, report = os.path.abspath, os.path.realpath, os.write, os.dup(2)

    def leaves(event: str, args: tuple) -> bool:
        if event == "socket.__new__":  # of Unix sockets, an event loop needs a pair
            return args[1] != 1 or sys._getframe(3).f_code.co_name != "socketpair"
        if event == "subprocess.Popen":
            return args[1] != ["uname", "-p"]  # which the module platform runs
        if event not in touches or isinstance(args[0], int):
            return event in forbidden
        changes = args[2] & os.O_ACCMODE if event == "open" else event[3:] in writes
        for resolved in (absolute, real):
            path = f"{resolved(os.fsdecode(args[0]))}/"
            shown = path.startswith(installed) and not changes
            if path.startswith((*installed, *hidden)) and not shown and not path.startswith(harmless):
                return True
        return False

    def audit(event: str, args: tuple) -> None:
        try:
            if leaves(event, args):
                write(report, b"\0escape\n")
        except Exception:  # odd arguments, which the call itself will refuse
            pass

    main = type(sys)("__main__")
    sys.modules["__main__"], sys.argv = main, [""]
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # pyright: ignore
    spare = [bytearray(4 << 20)]  # for the message, when there is no memory left
    sys.addaudithook(audit)
    write(report, b"\0ready\n")
    try:
        tree: _ast.Module = compile(source.decode(), "<tool>", "exec", 0x400)  # pyright: ignore  # ast.PyCF_ONLY_AST
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
        exec(compile(tree, "<tool>", "exec"), main.__dict__)
        if last:
            exec(compile(_ast.Interactive([last]), "<tool>", "single"), main.__dict__)  # shows its value
    except SystemExit:
        raise
    except BaseException as error:
        spare.clear()
        message = " ".join(str(error).split())
        sys.stderr.write(f"{type(error).__name__}{': ' if message else ''}{message}\n")
        raise SystemExit(1) from None


_SOURCE = inspect.getsource(_inside)


@dataclass
class _Said:
    stdout: bytearray
    stderr: bytearray
    spawned: float
    started: float | None = None
    """When the code started, on the monotonic clock like the others; None if it did not."""
    ended: float = 0.0
    stopped: Literal["timeout", "output"] | None = None
    """What it has to be killed for."""


def _drained(process: subprocess.Popen[bytes], limits: Limits) -> _Said:
    """What the process says until it ends or has to be ended; reads no more than it may say."""
    said = _Said(bytearray(), bytearray(), time.monotonic())
    deadline = said.spawned + _START_SECONDS
    with selectors.DefaultSelector() as selector:
        for stream, said_there in ((process.stdout, said.stdout), (process.stderr, said.stderr)):
            assert stream
            selector.register(stream, selectors.EVENT_READ, said_there)
        while selector.get_map() and not said.stopped:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                piece = os.read(key.fd, 1 << 16)
                key.data.extend(piece)
                if not piece:
                    selector.unregister(key.fileobj)
            if said.started is None and _READY in said.stderr:
                said.started = time.monotonic()
                deadline = said.started + limits.wall_seconds
            if len(said.stdout) + len(said.stderr) > _OUTPUT_BYTES:
                said.stopped = "output"
            elif time.monotonic() >= deadline:
                said.stopped = "timeout"
    try:
        if not said.stopped:  # it may have closed its streams and live on
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        said.stopped = "timeout"
    said.ended = time.monotonic()
    return said


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what still runs, and wait until nothing does.

    Under bubblewrap the interpreter is a child of the process, which waits for it; so it is the child that is killed.
    """
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        for pid in pids or [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


def _result(said: _Said, code: int, limits: Limits) -> ToolResult:
    by_signal = -code if code < 0 else code - 128 if code > 128 else 0  # bwrap says 128 + signal, as a shell does
    errors = bytes(said.stderr).replace(_READY, b"").replace(_ESCAPE, b"").decode(errors="backslashreplace")
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    status: Status = "ok" if code == 0 else "error"
    note = ""
    if said.stopped == "timeout":
        status, note = "timeout", f"[stopped after {limits.wall_seconds:g} s]"
    elif said.stopped == "output":
        status, note = "output", f"[stopped after {_OUTPUT_BYTES} bytes of output]"
    elif by_signal == signal.SIGKILL and said.ended - said.spawned > limits.cpu_seconds:  # one task: not sooner
        status, note = "timeout", f"[stopped after {limits.cpu_seconds} s of processor time]"
    elif by_signal == signal.SIGSYS:
        note = "[stopped: forbidden system call]"
    elif by_signal in set(signal.Signals):
        note = f"[ended by {signal.Signals(by_signal).name}]"
    elif code and not last:
        note = f"[exit code {code}]"
    elif code and last.startswith("MemoryError"):
        status = "memory"
    failure = _printable(last[: limits.output_chars])[: limits.output_chars // 2] if code and not note else ""
    text = said.stdout.decode(errors="backslashreplace").replace("\r\n", "\n").rstrip("\n")
    text = _printable(text[: limits.output_chars + 1])
    if len(text) > limits.output_chars - len(failure):
        text = f"{text[: limits.output_chars - len(failure)]}\n[output cut at {limits.output_chars} characters]"
    return ToolResult(
        output="\n".join(part for part in (text, failure, note) if part),
        status=status,
        escape_attempt=_ESCAPE in said.stderr or by_signal == signal.SIGSYS,
        seconds=said.ended - (said.started or said.ended),
    )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _filter(machine: str) -> bytes:
    """The seccomp program: an array of `struct sock_filter`, which returns what to do with the system call at hand.

    Raises:
        InputError: The numbers of this machine's system calls are not known.
    """
    if machine not in ("x86_64", "aarch64"):
        raise InputError(f"no table of system calls for {machine}")
    column, architecture = (0, 0xC000003E) if machine == "x86_64" else (1, 0xC00000B7)
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, kill, errno_eperm, errno_enosys = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for table, verdict in ((_ATTACKS, kill), (_NEEDED, allow)):
        for entry in table.split(","):
            if (number := entry.split()[1:][column]) != "-":
                program += [(equal, 0, 1, int(number)), (answer, 0, 0, verdict)]
    for numbers, position, values in _NEEDED_WITH.values():
        skipped = 2 * len(values) + 2
        program += [(equal, 0, skipped, numbers[column]), (load, 0, 0, 16 + 8 * position)]
        for value in values:
            program += [(equal, 0, 1, value), (answer, 0, 0, allow)]
        program.append((answer, 0, 0, errno_eperm))
    # Since Linux 5.1 numbers are the same on all machines, and libraries do without what an older Linux did not have.
    program += [(at_least, 0, 1, 424), (answer, 0, 0, errno_enosys), (answer, 0, 0, errno_eperm)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


# System calls and their numbers on x86_64 and aarch64, from Linux' unistd.h.
_NEEDED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, close 3 57,
close_range 436 436, open 2 -, openat 257 56, creat 85 -, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
copy_file_range 326 285, sendfile 40 71, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291,
access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, statfs 137 43, fstatfs 138 44,
getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, umask 95 166, mkdir 83 -, mkdirat 258 34,
rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, symlink 88 -,
symlinkat 266 36, link 86 -, linkat 265 37, truncate 76 45, ftruncate 77 46, fsync 74 82, fdatasync 75 83,
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, msync 26 227, madvise 28 233, mincore 27 232, brk 12 214,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, eventfd2 290 19, recvfrom 45 207, getsockopt 55 209, setsockopt 54 208, getsockname 51 204,
getpeername 52 205, shutdown 48 210, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113,
clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getitimer 36 102, setitimer 38 103, alarm 37 -,
pause 34 -, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, futex 202 98,
set_robust_list 273 99, rseq 334 293, membarrier 324 283, sched_yield 24 124, sched_getaffinity 204 123,
getcpu 309 168, getrandom 318 278, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getpgrp 111 -,
getpgid 121 155, getsid 124 156, uname 63 160, sysinfo 99 179, getrusage 98 165, getrlimit 97 163, setrlimit 160 164,
wait4 61 260, waitid 247 95, exit 60 93, exit_group 231 94
"""
"""What computing, files, clocks and an event loop need, and what acts on nothing but the caller. All others fail with
EPERM: sockets, new tasks and programs, signals, scheduling, attributes of files (which Landlock does not govern), files
and segments in memory (which the limit of memory does not count)."""
_NEEDED_WITH: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    "socketpair": ((53, 199), 0, (1,)),  # AF_UNIX
    "prlimit64": ((302, 261), 0, (0,)),  # of the caller
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)),  # not F_SETOWN, which sends signals
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # a terminal's size, but no input to it
}
"""Needed with these values of one argument: numbers, position of the argument, its values."""
_ATTACKS = """
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, pidfd_getfd 438 438, kcmp 312 272, mount 165 40,
umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429, fsopen 430 430,
fspick 433 433, unshare 272 97, setns 308 268, setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143,
setresuid 117 147, setresgid 119 149, setgroups 116 159, capset 126 91, keyctl 250 219, add_key 248 217,
request_key 249 218, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425,
init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294,
reboot 169 142, swapon 167 224, swapoff 168 225, acct 163 89, quotactl 179 60, sethostname 170 161,
setdomainname 171 162, settimeofday 164 170, clock_settime 227 112, open_by_handle_at 304 265
"""
"""What no honest program of one task calls: it is killed on the spot, by a signal that tells us why."""
