"""Commands that start at once: a process that has imported the library forks for each of them.

Imports take seconds, most of what a test of the command line takes. Arguments, folder, environment, output and exit status are those of the
real program. Tests whose subject is the process itself start a real one: what it imports, sends or weighs, signals to it, other users.
"""
import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

FORK = multiprocessing.get_context("fork")
ADDRESS = "IMAGINET_TEST_FORKS" # environment variable with the socket of the server
SHARED = "IMAGINET_TEST_SERVER" # environment variable with what `server` returns, of the server that tests/conftest.py has started
NOT_YET = {"imaginet_nb.data.imaginet", "imaginet_nb.apps.cards"} # huggingface_hub reads its variables when it is imported
OTHERS = ("ipykernel.debugger", "ipykernel.kernelapp", "ipykernel.ipkernel", "matplotlib.backends.backend_agg",
          "matplotlib.backends.backend_pdf", "nbconvert", "pandas.io.formats.style", "pyarrow.pandas_compat", "snakemake.cli",
          "torch._dynamo", "torchvision.models.resnet", "umap") # torch._dynamo: for each optimizer; style: for each table in LaTeX


# --- the server: a script, so that nothing of the tests' own process is in it

def serve(listener: socket.socket) -> None:
    "Fork for each request, until standard input ends."
    library = importlib.import_module("imaginet_nb")
    ours = {module.name for module in pkgutil.walk_packages(library.__path__, "imaginet_nb.")} - NOT_YET
    for name in (*sorted(ours), *OTHERS): importlib.import_module(name)
    gc.freeze() # pages of memory stay shared
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection = listener.accept()[0]
        FORK.Process(target=answer, args=(listener, connection)).start()
        connection.close()
    for process in multiprocessing.active_children(): process.join()


def answer(listener: socket.socket, connection: socket.socket) -> None:
    "Fork once more, for the program; report its exit status, or end it when nobody listens any more."
    listener.close()
    text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    if not text.endswith(b"\n"): text += connection.makefile("rb").readline()
    program = FORK.Process(target=become, args=(connection, json.loads(text), streams))
    program.start()
    if connection in select.select([program.sentinel, connection], [], [])[0]: program.kill()
    program.join()
    with contextlib.suppress(BrokenPipeError): connection.sendall(str(program.exitcode).encode())


def become(connection: socket.socket, request: dict, streams: list[int]) -> None:
    "Be the program."
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), *(open(n, "w", 1, closefd=False) for n in (1, 2))
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None # TMPDIR may be another one
    importlib.reload(sys.modules["imaginet_nb"]) # which sets variables
    if request["limit"]: resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"],)*2)
    sys.path[:0] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place not in ("", *sys.path)]
    sys.argv = [request["program"], *request["words"]]
    match request["program"]:
        case "imaginet": sys.modules["imaginet_nb.apps.cli"].main()
        case "snakemake": sys.modules["snakemake.cli"].main()
        case "kernel": sys.modules["ipykernel.kernelapp"].launch_new_instance()
        case "python": exec(sys.argv.pop(1), {"__name__": "__main__"})


# --- its clients

def ask(request: dict, streams: list[int]) -> int:
    "Have a program run; its exit status."
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(request["environment"][ADDRESS])
        request = json.dumps(request).encode() + b"\n"
        sent = connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))])
        connection.sendall(request[sent:])
        return int(connection.recv(100) or -signal.SIGKILL)


@functools.cache
def server() -> dict[str, str]:
    "Start a server, unless there is one for all test processes; variables with which programs and Jupyter's kernels start there."
    if SHARED in os.environ: return json.loads(os.environ[SHARED])
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder/"socket"))
    listener.listen(50)
    words = [sys.executable, __file__, "serve", str(listener.fileno())]
    quiet = {"TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], env={**os.environ, **quiet})
    listener.close()
    client, spec = [sys.executable, "-S", __file__], folder/"kernels"/"python3"/"kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(dict(argv=[*client, "kernel", "-f", "{connection_file}"], display_name="python3", language="python")))
    for program in ("imaginet", "snakemake"):
        (folder/program).write_text(f'#!/bin/sh\nexec {shlex.join([*client, program])} "$@"\n')
        (folder/program).chmod(0o755)
    def stop() -> None:
        process.communicate()
        shutil.rmtree(folder)
    atexit.register(stop)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {ADDRESS: str(folder/"socket"), "JUPYTER_PATH": str(folder), "PATH": path}


def run(program: str, *words: object, cwd: Path | None = None, limit: int | None = None, **environment: str) -> subprocess.CompletedProcess:
    "Run `imaginet`, `snakemake` or the code of `python` in a process of its own; `limit` is the largest file that it may write, in bytes."
    request = dict(program=program, words=list(map(str, words)), folder=str(cwd or Path.cwd()), limit=limit,
                   environment={**os.environ, **server(), "TQDM_DISABLE": "1", **environment})
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        status = ask(request, [nothing.fileno(), out.fileno(), err.fileno()])
        for stream in (out, err): stream.seek(0)
        return subprocess.CompletedProcess([program, *request["words"]], status, out.read(), err.read())


def reproduce(profile: str, **options: bool) -> None:
    "`imaginet reproduce` in this process; the notebooks that it runs, and their kernels, fork. Raises where it fails."
    from unittest import mock  # takes longer to import than a client takes
    cli = importlib.import_module("imaginet_nb.apps.cli")
    with mock.patch.object(cli, "_environment", lambda: {**os.environ, **server()}): cli.reproduce(profile, **options)


imaginet, python = functools.partial(run, "imaginet"), functools.partial(run, "python")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        del sys.path[0] # the folder of tests
        serve(socket.socket(fileno=int(sys.argv[2])))
        os._exit(0) # the libraries take seconds to say goodbye
    else:
        request = dict(program=sys.argv[1], words=sys.argv[2:], folder=os.getcwd(), environment=dict(os.environ), limit=None)
        sys.exit(ask(request, [0, 1, 2]))
