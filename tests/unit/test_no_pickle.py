"""Nothing that crosses the network or carries data is unpickled: a scan of the source, and a
process that counts while a group travels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.buffer_process import make_run

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BUILTINS = {"eval", "exec", "compile"}
OBJECT_COLLECTIVES = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip
ALLOWED = {
    ("learner/sharded_files.py", "torch.save"): (
        "writes common.pt, the part of Megatron's checkpoint format that is a pickle; it lies in "
        "the run directory, which nobody else may write (buffer/auth.py); its digest is checked "
        "before it is opened (learner/checkpoint.py)"
    ),
    ("learner/parallel.py", "all_gather_object"): (
        "between the ranks of one learner, over the process group that carries the gradients too"
    ),
}
"""(file below dapo_hpc/, what) -> why nobody else can have written what it unpickles."""


def found_in(source: str) -> set[str]:
    """What the scan objects to in a module's text."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            found |= {name} if name.split(".")[0] in MODULES else set()
        elif isinstance(node, ast.Call):
            found |= _in_call(node)
    return found


def _in_call(node: ast.Call) -> set[str]:
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    called = ast.unparse(node.func)
    name = called.rpartition(".")[2]
    if called in BUILTINS:
        return {called}
    if name in OBJECT_COLLECTIVES or called == "torch.save" or called.startswith("yaml."):
        return {name if name in OBJECT_COLLECTIVES else called}
    if called == "torch.load" and keywords.get("weights_only") != "True":
        return {called}
    if keywords.get("allow_pickle", "False") != "False":
        return {f"{called}(allow_pickle)"}
    # multiprocessing.Connection.recv takes no argument and unpickles; a socket's takes a size.
    is_connection = name == "recv" and not node.args
    return {f"{called}()"} if is_connection and isinstance(node.func, ast.Attribute) else set()


def test_no_module_unpickles() -> None:
    found: dict[tuple[str, str], str] = {}
    for package in (ROOT / "dapo_hpc", ROOT / "kernels"):
        for path in sorted(package.rglob("*.py")):
            for what in found_in(path.read_text()):
                found[str(path.relative_to(package)), what] = str(path)
    assert {k: v for k, v in found.items() if k not in ALLOWED} == {}
    assert {k for k in ALLOWED if k not in found} == set(), "an exception nobody needs any more"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "def f():\n    import marshal",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "connection.recv()",
        "dist.broadcast_object_list(x)",
    ],
)
def test_the_scan_finds_what_is_planted(source: str) -> None:
    assert found_in(source)


@pytest.mark.parametrize(
    "source",
    ["torch.load(path, weights_only=True)", "np.load(path)", "socket.recv(4096)", "model.eval()"],
)
def test_the_scan_leaves_the_rest_alone(source: str) -> None:
    assert not found_in(source)


PROGRAM = """
import sys
found = []
sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
from pathlib import Path
from dapo_hpc.buffer import messages as msg
from dapo_hpc.records import PolicyVersion
from dapo_hpc.run_dir import RunDir
from tests.buffer_process import client_of
from tests.buffer_served import ServedBuffer
from tests.buffer_world import piece, response, submission

served = ServedBuffer(RunDir(Path(sys.argv[1])))
served.start()
client = client_of(served.run)
version = PolicyVersion(step=0, lineage=client.register(0))
client.publish(version, is_evaluated=True)
reply = None
while reply is None or reply.groups is None:
    asked = msg.LeaseRequest(
        actor="a", version=version, max_responses=40, wait_s=0.0, stats=msg.ActorStats()
    )
    for lease in client.lease(asked).leases:
        first = lease.missing[0]
        progress = msg.LeaseProgress(
            lease_id=lease.lease_id, new_tokens=[piece(first.index, 0, 2, version)], offsets=[0]
        )
        client.heartbeat(
            msg.HeartbeatRequest(
                actor="a", version=version, leases=[progress], stats=msg.ActorStats()
            )
        )
        done = [response(p.index, version, is_correct=p.index == 0) for p in lease.missing]
        client.submit(submission(lease.lease_id, done))
    reply = client.take(1, 1, 0.0)
groups = client.fetch([group.group_id for group in reply.groups])
assert len(groups) == 2 and len(groups[0].responses[0].token_ids) == 3
client.commit(1, 1)
client.status()
served.stop()
if sys.argv[2] == "planted":
    import collections, pickle
    pickle.loads(pickle.dumps(collections.OrderedDict()))
print("classes unpickled:", len(found), found[:3])
"""


@pytest.mark.parametrize(("mode", "count"), [("plain", 0), ("planted", 1)])
def test_no_class_is_unpickled_while_a_group_travels(tmp_path: Path, mode: str, count: int) -> None:
    """Buffer, actor's and learner's client in one process, on a real socket, with an audit hook."""
    run = make_run(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run.root), mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"classes unpickled: {count}" in result.stdout, result.stdout + result.stderr
