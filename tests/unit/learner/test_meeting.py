"""How ranks find each other, and what happens when one of them is started again."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from dapo_hpc.learner import parallel
from dapo_hpc.learner.parallel import Layout, PeerLost, Processes


def test_a_restarted_rank_breaks_the_old_store_and_finds_the_new_one(
    here: Processes, tmp_path: Path
) -> None:
    address = tmp_path / "learner.json"
    old = parallel._meet(2, 0, address)
    parallel._meet(2, 1, address)  # rank 1 joins, then dies
    first = Processes(Layout(data=2), 0, old, here.device)
    first.check_peers()

    found: list[object] = []
    restarted = threading.Thread(target=lambda: found.append(parallel._meet(2, 1, address)))
    restarted.start()
    restarted.join(timeout=2.0)
    assert restarted.is_alive(), "it waits for a new store"
    with pytest.raises(PeerLost, match="restarted"):
        first.check_peers()
    new = parallel._meet(2, 0, address)  # rank 0 starts anew
    restarted.join(timeout=10.0)
    assert not restarted.is_alive()
    new.set("key", "value")
    assert found[0].get("key") == b"value"  # type: ignore[attr-defined]


def test_an_address_of_a_dead_rank_0_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "MEET_S", 1.0)
    address = tmp_path / "learner.json"
    store = parallel._meet(2, 0, address)
    del store
    with pytest.raises(PeerLost, match="rank 1 of the learner found no rank 0"):
        parallel._meet(2, 1, address)
    address.unlink()
    with pytest.raises(PeerLost, match="found no rank 0"):
        parallel._meet(2, 1, address)


def test_messages_of_rank_0_arrive_in_order_and_old_ones_go(
    here: Processes, tmp_path: Path
) -> None:
    address = tmp_path / "learner.json"
    store = parallel._meet(2, 0, address)
    assert json.loads(address.read_text())["world"] == 2
    sender = Processes(Layout(data=2), 0, store, here.device)
    receiver = Processes(Layout(data=2), 1, parallel._meet(2, 1, address), here.device)
    messages = [b"\x00\xff bytes", b"", b"x" * 1_000_000, b"last"]
    for message in messages:
        sender.announce(message)
        assert receiver.listen() == message
    assert not store.check(["message/0"])
    assert store.check(["message/3"])


def test_a_wrong_number_of_processes_is_told(here: Processes) -> None:
    del here
    with pytest.raises(ValueError, match=r"3 learner processes .* 2 \* 1 \* 2 \* 1 = 4"):
        Layout(tensor=2, data=2).require_world(3)
