"""The kernel benchmarks: what they count, whom they believe, and that a small run works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "perf"))

import bench_dapo_loss  # noqa: E402
import bench_linear_dapo_loss  # noqa: E402
import bench_logprob  # noqa: E402
import run_all  # noqa: E402
from kernel_bench import clock, command, counts, eager, machine, peers, report, targets  # noqa: E402
from kernel_bench.ceilings import Ceilings  # noqa: E402
from kernel_bench.clock import Budget, Candidate, CpuClock, GpuClock, take_turns  # noqa: E402
from kernel_bench.inputs import draw_linear, draw_logits, draw_loss  # noqa: E402
from kernel_bench.record import Record  # noqa: E402
from kernel_bench.task import OURS, Absent, Provider, Settings, Sizes, Task, Work  # noqa: E402

CPU = torch.device("cpu")
SMALL = 4096
FEW = (OURS, "torch eager", "verl torch", "bare products")


def run(tasks: Callable[[Settings], list[Task]], path: Path | None = None) -> dict[str, Any]:
    """What a benchmark finds on a CPU with tiny shapes and without peers."""
    record = Record("test", {"machine": machine.describe(CPU), "peers": {}}, path)
    settings = Settings(device=CPU, shrink=SMALL, only=FEW)

    def short(given: Settings) -> list[Task]:
        # Frozen for whoever writes benchmarks; here a few launches are enough.
        for task in (found := tasks(given)):
            object.__setattr__(task, "launches", 3)
        return found

    assert command.run(record, settings, Budget(60.0), short) == 0
    return record.found


# ------------------------------------------------------------------ counts


def test_bytes_and_flops_are_those_counted_by_hand() -> None:
    sizes = Sizes(tokens=3, vocab=10, hidden=7)
    # 30 bfloat16 logits, 3 ids of 8 bytes, 3 log-probs and 3 entropies of 4.
    assert counts.logprob_forward(sizes) == Work(60 + 24 + 24)
    # Logits read and written, ids, upstream gradient.
    assert counts.logprob_backward(sizes) == Work(2 * 60 + 24 + 12)
    assert counts.logprob_both(sizes) == Work(60 + 24 + 24 + 2 * 60 + 24 + 12)
    assert counts.logprob_both(sizes, item=4).bytes == 3 * 120 + 2 * 24 + 24 + 12
    # And old, rollout, advantage and weight of 3 tokens; of one the row is not read again.
    assert counts.loss_of_logits(sizes).bytes == 264 + 4 * 12
    assert counts.loss_of_logits(sizes, moving=2 / 3).bytes == 264 + 4 * 12 - 20
    # 21 and 70 parameters of 2 bytes; a product is 2 * 3 * 10 * 7 operations.
    assert counts.scoring(sizes) == Work(42 + 140 + 24 + 24, flops=420)
    # Hidden read, its gradient written; weight read; main_grad read and written in float32.
    assert counts.linear_loss(sizes) == Work(2 * 42 + 140 + 2 * 280 + 24 + 48, flops=3 * 420)
    assert counts.linear_loss(Sizes(tokens=4, vocab=10, hidden=7), kept=0.5).flops == 2 * 420
    # 6 figures of a token read, 1 written.
    assert counts.dapo_loss(sizes) == Work(7 * 12)


def test_rows_that_are_left_out_are_written_but_not_read() -> None:
    # 2 of 4 rows kept: 2 read forward; 2 read and 4 written backward.
    both = counts.logprob_both(Sizes(tokens=4, vocab=10), kept=0.5)
    assert both.bytes == (2 + 2 + 4) * 20 + 2 * (8 + 8) + 2 * (8 + 4)


def test_floor_is_the_longer_of_bytes_and_flops() -> None:
    ceilings = Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s=1e12)
    assert ceilings.floor_ms(Work(2_000_000)) == pytest.approx(2.0)
    assert ceilings.bound(Work(2_000_000, flops=1)) == "copy"
    assert ceilings.floor_ms(Work(1, flops=3_000_000_000)) == pytest.approx(3.0)
    assert ceilings.bound(Work(1, flops=3_000_000_000)) == "matmul"


def test_quantiles_interpolate() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert clock.quantile(values, 0.2) == pytest.approx(1.8)
    assert clock.quantile(values, 0.8) == pytest.approx(4.2)
    assert clock.quantile([7.0], 0.8) == 7.0


# ------------------------------------------------------------------ inputs


def test_inputs_are_peaked_like_a_policy_and_the_same_every_time() -> None:
    sizes = Sizes(tokens=256, vocab=1000, hidden=128)
    logits, linear = draw_logits(sizes, CPU, torch.bfloat16), draw_linear(sizes, CPU, torch.float32)
    for tokens in (logits.loss, linear.loss):
        likely = (tokens.logprobs.exp() > 0.5).double().mean()
        assert 0.4 < likely < 0.95
        assert 0.0 < tokens.moving_frac() < 1.0, "some tokens are masked or clipped, not all"
    again = draw_logits(sizes, CPU, torch.bfloat16)
    assert torch.equal(again.logits, logits.logits)
    assert (logits.upstream != 0).all()
    assert {bool(a > 0) for a in logits.loss.advantages.unique()} == {True, False}
    importance = draw_loss(sizes, CPU)
    difference = importance.old_logprobs - importance.rollout_logprobs
    assert (difference.exp() > eager.IMPORTANCE_CAP).any()


def test_the_slope_of_the_loss_is_its_derivative() -> None:
    given = draw_loss(Sizes(tokens=64), CPU).double()
    step = 1e-6
    for token in range(0, 64, 7):
        shift = torch.zeros(64, dtype=torch.float64)
        shift[token] = step
        up, _ = eager.loss_at(given.logprobs + shift, given)
        down, _ = eager.loss_at(given.logprobs - shift, given)
        assert eager.slope(given)[token] == pytest.approx(float(up - down) / 2 / step, abs=1e-8)


# ------------------------------------------------------------------ small runs


BENCHES = (bench_logprob, bench_linear_dapo_loss, bench_dapo_loss)


@pytest.fixture(scope="module", params=BENCHES, ids=lambda bench: bench.__name__)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run(request.param.tasks)


def test_a_small_run_measures_ours_and_torch_in_every_task(found: dict[str, Any]) -> None:
    assert found["ended"] == "done"
    assert {row["status"] for row in found["rows"]} <= {"measured", "absent"}
    for task in found["tasks"]:
        rows = [row for row in found["rows"] if row["task"] == task["task"]]
        if task["task"] == "row kernels, launches":
            assert {row["reason"] for row in rows} == {"needs a GPU, or TRITON_INTERPRET=1"}
            continue
        measured = {row["provider"] for row in rows if row["status"] == "measured"}
        assert any(name.startswith(OURS) for name in measured), task["task"]


def test_a_row_says_all_that_a_figure_needs(found: dict[str, Any]) -> None:
    wanted = {"task", "provider", "shape", "dtype", "device", "ms", "p20_ms", "p80_ms", "launches"}
    wanted |= {"host_ms", "bytes", "flops", "bound", "share", "error", "errors", "note"}
    wanted |= {"extra_memory_mib", "peak_memory_mib"}
    for row in found["rows"]:
        assert row["device"] == "cpu"
        if row["status"] == "measured":
            assert wanted <= set(row)
            assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        else:
            assert row["reason"]
    assert {"commit", "torch", "triton", "python", "date"} <= set(found["machine"])


def test_shares_are_of_the_ceilings_of_this_run(found: dict[str, Any]) -> None:
    measured_beside = {task["task"]: task for task in found["tasks"]}
    for row in found["rows"]:
        if row["status"] == "measured":
            task = measured_beside[row["task"]]
            moving_s = row["bytes"] / task["copy_bytes_per_s"]
            multiplying_s = row["flops"] / task["matmul_flops_per_s"]
            assert row["share"] == pytest.approx(
                1e3 * max(moving_s, multiplying_s) / row["ms"], rel=1e-9
            )


def test_results_are_close_to_float64(found: dict[str, Any]) -> None:
    errors = [row["error"] for row in found["rows"] if row.get("error") is not None]
    assert errors
    assert max(errors) < 0.05


def test_the_report_shows_every_row(found: dict[str, Any]) -> None:
    text = report.markdown(command.whole([found]))
    assert "show that the script runs" in text
    for row in found["rows"]:
        assert f"### {row['task']}" in text
        assert row["provider"] in text
    assert "not measured" in text
    json.dumps(command.whole([found]), allow_nan=False)


@pytest.mark.slow
def test_run_all_writes_one_json_and_one_table(tmp_path: Path) -> None:
    words = [sys.executable, "perf/run_all.py", "--output", str(tmp_path / "out"), "--minutes", "3"]
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    words += ["--shrink", str(SMALL), "--peers", str(nothing)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = sorted((tmp_path / "out").iterdir())
    assert [path.suffix for path in written] == [".json", ".md"]
    found = json.loads(written[0].read_text())
    assert [bench["name"] for bench in found["benches"]] == list(run_all.BENCHES)
    assert {bench["ended"] for bench in found["benches"]} == {"done"}
    assert {target["met"] for target in found["targets"]} == {None}
    absent = {row["provider"] for b in found["benches"] for row in b["rows"] if row["reason"]}
    assert {"torch.compile", "TRL", "Liger", "flash-attn", "verl", "CCE", "QuACK"} <= absent


# ------------------------------------------------------------------ who is believed


def task_of(*providers: Provider) -> Task:
    return Task(
        name="test",
        sizes=Sizes(tokens=16, vocab=128),
        work=lambda _: Work(1000),
        draw=lambda sizes: draw_logits(sizes, CPU, torch.float32),
        truth=eager.truth_of_logits,
        providers=providers,
        check=Sizes(tokens=16, vocab=128),
        launches=3,
    )


def provider(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Provider:
    """Eager log-probs, changed."""

    def bind(inputs: Any) -> Callable[[], dict[str, torch.Tensor]]:
        def call() -> dict[str, torch.Tensor]:
            return {"logprobs": change(eager.logprob(inputs.logits, inputs.token_ids)[0])}

        return call

    return Provider(name=f"{OURS} {name}", bind=bind)


def absent(_: Any) -> Any:
    raise Absent("not on this machine")


def test_wrong_failing_and_absent_providers_are_listed_and_the_rest_is_timed() -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: a sentence\nand what nobody reads")

    providers = (
        provider("right", lambda x: x),
        provider("off by one", lambda x: x.roll(1)),
        provider("negated", lambda x: -x),
        provider("not finite", lambda x: torch.where(x < x.median(), torch.nan, x)),
        provider("of another shape", lambda x: x[:-1]),
        provider("raising", fail),
        Provider(name=f"{OURS} absent", bind=absent),
    )
    found = run(lambda _: [task_of(*providers)])
    rows = {row["provider"].removeprefix(f"{OURS} "): row for row in found["rows"]}
    assert rows.pop("right")["status"] == "measured"
    assert rows["raising"]["status"] == "failed"
    assert rows["raising"]["reason"] == "RuntimeError: CUDA error: a sentence"
    assert rows["absent"]["status"] == "absent"
    assert rows["absent"]["reason"] == "not on this machine"
    for name in ("off by one", "negated", "not finite", "of another shape"):
        assert rows[name]["status"] == "wrong", name
        assert "logprobs" in rows[name]["reason"]
    assert all("ms" not in row for row in rows.values()), "only what is right is timed"
    text = report.markdown(command.whole([found]))
    assert "off by one: wrong: differs from float64: logprobs by" in text
    json.dumps(found, allow_nan=False)


def test_a_task_whose_inputs_do_not_fit_is_left_out() -> None:
    def draw(sizes: Sizes) -> Any:
        if sizes.tokens > 16:
            raise torch.OutOfMemoryError("no memory for 20 GB of logits")
        return draw_logits(sizes, CPU, torch.float32)

    task = task_of(provider("right", lambda x: x))
    large = replace(task, name="large", draw=draw, sizes=Sizes(tokens=32, vocab=128))
    found = run(lambda _: [large, task])
    left_out, done = found["tasks"]
    assert left_out["skipped"] == "OutOfMemoryError: no memory for 20 GB of logits"
    assert done["task"] == "test"
    assert "Left out: OutOfMemoryError" in report.markdown(command.whole([found]))


def test_a_provider_that_fails_while_it_is_timed_takes_no_more_turns() -> None:
    calls = []

    def fail_later() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")

    candidates = {"good": Candidate(lambda: None), "bad": Candidate(fail_later)}
    failed = take_turns(CpuClock(), candidates, launches=5, seconds=60.0)
    assert failed == {"bad": "OutOfMemoryError: no memory"}
    assert len(calls) == 2
    assert len(candidates["good"].times_ms) == 5


def test_launches_take_turns_and_restoring_is_not_timed() -> None:
    order: list[str] = []

    class Counting:
        def launch_ms(self, candidate: Candidate) -> float:
            assert candidate.restore is not None
            candidate.restore()
            candidate.call()
            return 1.0

    def candidate(name: str) -> Candidate:
        return Candidate(lambda: order.append(name), lambda: order.append(f"restore {name}"))

    take_turns(Counting(), {n: candidate(n) for n in "ab"}, launches=2, seconds=60.0)
    assert order == ["restore a", "a", "restore b", "b"] * 2


def test_the_time_ends_the_rounds_but_leaves_a_median() -> None:
    candidates = {"a": Candidate(lambda: None)}
    take_turns(CpuClock(), candidates, launches=100, seconds=-1.0)
    assert len(candidates["a"].times_ms) == clock.SURE_ROUNDS


def test_a_start_that_takes_too_long_is_cut_off() -> None:
    def endless() -> None:
        while True:
            pass

    with pytest.raises(TimeoutError, match="not ready"), clock.at_most(0.05):
        endless()


# ------------------------------------------------------------------ a GPU's clock without a GPU


class Event:
    """A device on which everything takes a millisecond of its own time."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at_ms = 0.0

    def record(self) -> None:
        self.at_ms = Event.now_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


@pytest.fixture
def gpu_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuClock]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 5 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 8 << 20)
    monkeypatch.setattr(clock, "FLUSH_BYTES", 64)
    return GpuClock(CPU)


def test_device_time_is_that_between_the_events_alone(
    gpu_clock: GpuClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = []

    def flush() -> None:
        flushes.append(1)
        Event.now_ms += 1.0

    def call() -> None:
        Event.now_ms += 20.0

    def restore() -> None:
        Event.now_ms += 100.0

    monkeypatch.setattr(gpu_clock, "_flush", flush)
    candidate = Candidate(call, restore, calls=10)
    gpu_clock.prepare(candidate)
    assert candidate.extra_bytes == 3 << 20
    candidate.host_ms, gpu_clock.flush_ms = 0.15, 1.0
    assert gpu_clock.launch_ms(candidate) == pytest.approx(2.0), "20 ms for 10 calls"
    assert len(flushes) == 3, "1.5 times the 1.5 ms of the host, at 1 ms a flush"


# ------------------------------------------------------------------ targets


def row(task: str, name: str, **figures: Any) -> dict[str, Any]:
    blank = {"task": task, "provider": name, "status": "measured", "device": "cuda"}
    return {**blank, "shape": {"tokens": 8192, "hidden": 3584}, **figures}


def verdicts(*rows: dict[str, Any]) -> dict[tuple[str, str], bool]:
    judged = targets.judge(list(rows))
    return {(t["task"], t["target"]): t["met"] for t in judged if t["met"] is not None}


def test_targets_are_met_or_not_by_the_rows_of_a_gpu() -> None:
    ours = row(targets.FORWARD, OURS, ms=1.0, share=0.93)
    peer = row(targets.FORWARD, "Liger", ms=3.0, share=0.31)
    assert verdicts(ours, peer) == {
        (targets.FORWARD, "share of the ceiling"): True,
        (targets.FORWARD, "times as fast as Liger"): False,
    }
    assert verdicts({**ours, "device": "cpu"}, {**peer, "device": "cpu"}) == {}
    assert verdicts({**ours, "status": "failed"}, peer) == {}


def test_target_of_memory_leaves_the_gradient_of_hidden_out() -> None:
    gradient_mib = 8192 * 3584 * 2 / 2**20
    for extra_mib, met in ((1200.0, True), (1300.0, False)):
        linear = row(targets.LINEAR, OURS, ms=1.0, extra_memory_mib=gradient_mib + extra_mib)
        judged = verdicts(linear)
        assert judged[targets.LINEAR, "extra memory without the gradient of hidden"] is met


def test_every_target_names_a_task_that_is_run() -> None:
    settings = Settings(device=CPU)
    tasks = {t.name: t for bench in BENCHES for t in bench.tasks(settings)}
    for target in targets.TARGETS:
        assert target.task in tasks
        peer = target.what.removeprefix("times as fast as ")
        if peer != target.what:
            assert peer in {p.name for p in tasks[target.task].providers}, target.what
    names = [t.name for bench in BENCHES for t in bench.tasks(settings)]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------ files and processes


def test_figures_of_a_cpu_are_written_only_where_someone_asks() -> None:
    assert command.results_folder(None, "cpu") is None
    assert command.results_folder(Path("x"), "cpu") == Path("x")
    assert command.results_folder(None, "cuda") == ROOT / "perf" / "results"


def test_the_record_is_on_disk_after_every_step(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    seen = []

    def look(_: Any) -> Any:
        seen.append(json.loads(path.read_text())["ended"])
        return lambda: {}

    run(lambda _: [task_of(Provider(name=OURS, bind=look))], path)
    assert seen == [f"while test: checking {OURS}", f"while test: starting {OURS}"]
    assert json.loads(path.read_text())["ended"] == "done"


DYING = """
import json, os, sys
words = sys.argv[1:]
without = words[words.index("--without") + 1 :] if "--without" in words else []
row = lambda task, name: {"task": task, "provider": name, "status": "measured", "note": "",
    "reason": "", "shape": {"tokens": 1}, "dtype": "bfloat16", "device": "cpu", "ms": 1.0,
    "p20_ms": 1.0, "p80_ms": 1.0, "share": 0.5, "bound": "copy", "host_ms": 1.0,
    "extra_memory_mib": None}
part = {"name": "dying", "machine": MACHINE, "peers": {}, "tasks": [{"task": "first"}],
    "rows": [row("first", "good")], "ended": "while second: starting bad", "provider": "bad"}
if "bad" in without:
    part["tasks"].append({"task": "second"})
    part["rows"].append(row("second", "good"))
    part.update(ended="done", provider=None)
with open(words[words.index("--part") + 1], "w") as file:
    json.dump(part, file)
sys.exit(0 if "bad" in without else 3)
"""


def test_a_benchmark_that_dies_is_run_again_without_the_provider_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.replace("MACHINE", repr(machine.describe(CPU))))

    def command_of(_: str, args: Any, without: list[str], part: Path, seconds: float) -> list[str]:
        assert seconds > 0
        assert args.without == [], "the caller's list is left alone"
        words = [sys.executable, str(script), "--part", str(part)]
        return words + (["--without", *without] if without else [])

    monkeypatch.setattr(run_all, "command", command_of)
    collection = run_all.Collection(tmp_path / "out")
    until = run_all.time.monotonic() + 60.0
    assert run_all.run_bench("dying", SimpleNamespace(without=[]), collection, until) == 0
    rows = {(r["task"], r["provider"]): r for r in collection.parts["dying"]["rows"]}
    assert rows["first", "good"]["status"] == rows["second", "good"]["status"] == "measured"
    assert rows["first", "bad"]["status"] == "failed"
    assert "exit status 3" in rows["first", "bad"]["reason"]
    text = next((tmp_path / "out").glob("*.md")).read_text()
    assert "the process died (while second: starting bad), exit status 3" in text


def test_a_result_is_never_written_over(tmp_path: Path) -> None:
    place = tmp_path / "2026-01-01_kernels_cpu_abc"
    assert run_all.free_place(place) == place
    (tmp_path / f"{place.name}.json").touch()
    (tmp_path / f"{place.name}-2.json").touch()
    assert run_all.free_place(place).name == f"{place.name}-3"


# ------------------------------------------------------------------ peers


def test_a_peer_that_is_not_there_says_what_is_missing() -> None:
    with pytest.raises(Absent, match="cannot import no_such_peer"):
        peers.module("no_such_peer.kernels")
    with pytest.raises(Absent, match="no such/file.py in the folder"):
        peers._find("such/file.py")


def test_a_single_file_is_loaded_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files" / "some_peer" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "files" / "some_peer" / "__init__.py").write_text("raise ImportError('ray')")
    (folder / "other.py").write_text("VALUE = 7")
    (folder / "one.py").write_text(
        "def value():\n    from . import other\n    return other.VALUE\n"
    )
    monkeypatch.setattr(peers, "_folders", [tmp_path / "files"])
    loaded = peers._load("_test_peer.kernels.one", "some_peer/kernels/one.py")
    assert loaded.value() == 7
    assert "some_peer" not in sys.modules
