"""Several nodes: they meet or say why not, they agree or say in what not; before any rank builds a model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
from dist import run_ranks
from ports import free_port

from megatron_oreal import cli
from megatron_oreal import platform as platforms
from megatron_oreal.config import Config
from megatron_oreal.config_load import load_config
from megatron_oreal.errors import UserError
from megatron_oreal.preflight import storage
from megatron_oreal.preflight.check import Place, check_nodes
from megatron_oreal.preflight.fabric import Bandwidth, Stages, judge, measure, read_result
from megatron_oreal.preflight.identity import require_reachable_servers, require_same_ranks, server_override
from megatron_oreal.preflight.meeting import Meeting, Seat
from megatron_oreal.preflight.result import Check, summary

LONG = 240
"""Seconds for what does not wait as long unless something is wrong."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    return tiny.write_run(tmp_path, model)


def all_at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns, or the ``UserError`` that it raises; each in a thread of its own."""

    def caught(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(2 * LONG) for future in [pool.submit(caught, call) for call in calls]]


def visit(seat: Seat, *items: Any) -> list[Any]:
    """Meet and gather each item in a round of its own."""
    with Meeting(seat) as meeting:
        return [meeting.gather(item, "item") for item in items]


# Meeting


def test_every_node_gets_what_every_node_has() -> None:
    port, count = free_port(), 24
    calls = [lambda rank=rank: visit(Seat(count, rank, "127.0.0.1", port, LONG), rank, [rank]) for rank in range(count)]
    expected = [list(range(count)), [[rank] for rank in range(count)]]
    assert all(found == expected for found in all_at_once(*calls))


def test_the_port_is_free_again_when_the_nodes_go_on() -> None:
    """Ranks listen on it next; nothing of the meeting may be taken for them."""
    port = free_port()

    def first() -> bool:
        # Listened on while the other one is still connected.
        with Meeting(Seat(2, 0, "127.0.0.1", port, LONG)) as meeting, socket.create_server(("127.0.0.1", port)):
            meeting.gather(None, "item")
        return True

    assert all_at_once(first, lambda: visit(Seat(2, 1, "127.0.0.1", port, LONG), None))[0] is True


def test_an_unreachable_master_is_one_line_within_the_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"node 0 was not reached within 1 s \(Connection refused\): start it with"):
        Meeting(Seat(2, 1, "127.0.0.1", free_port(), 1))
    assert time.monotonic() - began < LONG
    with pytest.raises(UserError, match=r"--master-addr=no-such-host\.invalid"):
        Meeting(Seat(2, 1, "no-such-host.invalid", 29500, 0.5))


def test_a_rank_without_the_others_ends_at_the_deadline_of_the_fabric(run: Path, tmp_path: Path) -> None:
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "megatron_oreal", "check", str(run), "--fabric", "--fabric-timeout", "1"]
    command += ["--fabric-folder", str(tmp_path)]
    env = os.environ | world | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=env, cwd=tiny.REPOSITORY, capture_output=True, text=True, timeout=LONG, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = read_result(tmp_path, [0], 1)
    assert isinstance(found, Check) and found.status == "fail"
    assert found.detail.startswith("rank 0 has waited 1 s for all ranks to join the process group: ")


def test_nodes_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 0 waits for one second more when the only other node has come, whenever that was."""
    receive = Meeting._receive_guest

    def then_hurry(meeting: Meeting, guest: Any) -> None:
        receive(meeting, guest)
        meeting._deadline = time.monotonic() + 1

    monkeypatch.setattr(Meeting, "_receive_guest", then_hurry)
    port = free_port()
    both = all_at_once(
        lambda: visit(Seat(4, 0, "127.0.0.1", port, LONG)), lambda: visit(Seat(4, 2, "127.0.0.1", port, LONG))
    )
    assert both[0] == both[1]
    assert both[0].startswith("2 of --nnodes=4 nodes came")
    assert "(missing: --node-rank 1, 3)" in both[0]


@pytest.mark.parametrize(
    ("seats", "words"),
    [
        ([(2, 0), (3, 1)], "--nnodes=3 on node 1"),
        ([(3, 0), (3, 1), (3, 1)], "--node-rank=1 was given twice"),
    ],
)
def test_nodes_that_were_started_wrong_are_named_on_all_of_them(seats: list[tuple[int, int]], words: str) -> None:
    port = free_port()
    calls = [lambda seat=seat: visit(Seat(*seat, "127.0.0.1", port, LONG), 0) for seat in seats]
    found = all_at_once(*calls)
    assert all(words in line for line in found), found


def send_and_leave(port: int, message: bytes) -> None:
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=LONG) as link:
                link.sendall(message)
            return
        except ConnectionRefusedError:  # node 0 does not listen yet
            time.sleep(0.02)


def test_a_stranger_at_the_port_does_no_harm() -> None:
    """A port scanner, a wrong client, one that connects and says nothing."""
    port = free_port()
    endless = b'{"magic": "megatron-oreal", "node_rank": Infinity, "nnodes": 2, "host": "b"}\n'

    def late() -> list[Any]:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b'{"magic": "other"}\n', b"[1]\n", b"\xff\n", endless, b""):
            send_and_leave(port, noise)
        return visit(Seat(2, 1, "127.0.0.1", port, LONG), "b")

    assert all_at_once(lambda: visit(Seat(2, 0, "127.0.0.1", port, LONG), "a"), late) == [[["a", "b"]]] * 2


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_node_that_ended_while_it_waited_may_be_started_again(order: tuple[int, int]) -> None:
    port = free_port()

    def guest(rank: int) -> list[Any]:
        gone.wait(LONG)
        time.sleep(0.3 * order.index(rank))
        return visit(Seat(3, rank, "127.0.0.1", port, LONG), rank)

    def first_try() -> None:
        send_and_leave(port, b'{"magic": "megatron-oreal", "node_rank": 1, "nnodes": 3, "host": "b"}\n')
        gone.set()

    gone = threading.Event()
    calls = [lambda: visit(Seat(3, 0, "127.0.0.1", port, LONG), 0), lambda: guest(1), lambda: guest(2)]
    assert all_at_once(*calls, first_try)[:3] == [[[0, 1, 2]]] * 3


def test_a_node_that_goes_away_is_named() -> None:
    port = free_port()

    def leaver() -> None:
        Meeting(Seat(3, 2, "127.0.0.1", port, LONG)).close()

    found = all_at_once(
        lambda: visit(Seat(3, 0, "127.0.0.1", port, LONG), 0),
        lambda: visit(Seat(3, 1, "127.0.0.1", port, LONG), 1),
        leaver,
    )
    assert found[0] == found[1]
    assert "node 2" in found[0] and "has not sent its item" in found[0]


# Checks of two nodes


def check_two(one: Config, other: Config) -> list[Any]:
    """``check_nodes`` of two nodes with one rank each."""
    port = free_port()

    def node(rank: int, config: Config) -> Any:
        with Meeting(Seat(2, rank, "127.0.0.1", port, LONG)) as meeting:
            return check_nodes(config, Place(2, rank, 1), meeting)

    return all_at_once(lambda: node(0, one), lambda: node(1, other))


def test_two_nodes_that_agree_pass_and_both_see_the_same(run: Path, tmp_path: Path) -> None:
    found = check_two(load_config(run), load_config(run))
    assert found[0] == found[1]
    assert summary(found[0]) is None
    names = {check.name for report in found[0] for check in report.checks}
    assert {"nodes", "clocks", "work_dir"} <= names
    assert not (tmp_path / "run").exists()


def test_nodes_with_other_configs_and_directories_fail_on_both(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SEEN_TIMEOUT_S", 0.5)
    found = check_two(load_config(run), load_config(run, ["seed=3", f"work_dir={tmp_path / 'elsewhere'}"]))
    assert found[0] == found[1]
    failed = {check.name: check.detail for report in found[0] for check in report.checks if check.status == "fail"}
    assert set(failed) == {"nodes", "work_dir"}
    assert "(and 1 more): start every node with the same file" in failed["nodes"]
    assert "not the same directory as on node 0" in failed["work_dir"]


def test_servers_listen_where_other_nodes_reach_them(run: Path) -> None:
    config = load_config(run, ["rollout.engine=sglang"])
    assert server_override(config, "10.0.0.7", 2) == "rollout.server.host=10.0.0.7"
    assert server_override(config, "10.0.0.7", 1) is None
    with pytest.raises(UserError, match=r"rollout\.server\.host='127\.0\.0\.1' is reached from its own node only"):
        require_reachable_servers(config, ["a", "b"])
    require_reachable_servers(config, ["a", "a"])
    config.rollout.server.host = "0.0.0.0"  # where the first rank would find its own node
    assert server_override(config, "10.0.0.7", 2) == "rollout.server.host=10.0.0.7"
    with pytest.raises(UserError, match=r"rollout\.server\.host='0\.0\.0\.0' is reached from its own node only"):
        require_reachable_servers(config, ["a", "b"])
    config.rollout.server.host = "10.0.0.7"
    assert server_override(config, "10.0.0.8", 2) is None
    require_reachable_servers(config, ["a", "b"])


# Training: launchers, and ranks under torchrun


def launcher(*arguments: object) -> subprocess.Popen[str]:
    """``megatron-oreal train`` as a node of two starts it."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "megatron_oreal", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, cwd=tiny.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_training_on_nodes_with_other_configs_ends_in_one_line_on_each(run: Path, tmp_path: Path) -> None:
    port = free_port()
    node = [run, "--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port]
    both = [launcher(*node, "--node-rank", rank, f"seed={rank}") for rank in range(2)]
    said = [process.communicate(timeout=LONG) for process in both]
    assert [process.returncode for process in both] == [2, 2]
    lines = [errors.splitlines() for _, errors in said]
    assert lines[0] == lines[1]
    (line,) = lines[0]
    assert line.startswith("error: the nodes differ in their config: seed is 0 on node 0")
    assert not (tmp_path / "run").exists()


def test_training_without_its_master_ends_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = [run, "--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", free_port()]
    assert cli.main(["train", *map(str, node), "--node-rank", "1", "--join-timeout", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "node 0 was not reached within 1 s" in line
    assert not (tmp_path / "run").exists()


def bandwidth_of_two_nodes() -> Bandwidth | None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    platform = platforms.init_distributed("cpu", LONG)
    with Stages(None, LONG, platform.rank) as stages:
        return measure(platform, stages)


@pytest.mark.slow
def test_bandwidth_within_nodes_is_measured_too() -> None:
    found = run_ranks("test_preflight_nodes:bandwidth_of_two_nodes", 4)
    assert found == [found[0]] * 4
    host = socket.gethostname()
    assert found[0].num_ranks == 4 and found[0].kinds == {host: "gloo"}
    assert found[0].by_node.keys() == {host} and found[0].by_node[host] > 0


def compare_with_own_seed(config_path: str, whole_run: bool) -> tuple[str, Bandwidth | None]:
    """A rank that is a node of its own, with a seed of its own: what it says of the others, and of the way to them."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    config = load_config(config_path, [f"seed={os.environ['RANK']}"])
    found = None
    try:
        if not whole_run:
            platform = platforms.init_distributed("cpu", LONG)
            with Stages(None, LONG, platform.rank) as stages:
                found = measure(platform, stages)
            require_same_ranks(config, platform)
            return "agreed", found
        from megatron_oreal.run import open_run  # brings Megatron with it, which the other tests here do without

        with open_run(config):
            return "opened", found
    except UserError as error:
        return str(error), found
    finally:
        platforms.shutdown_distributed()


@pytest.mark.parametrize("whole_run", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_under_torchrun_compare_their_nodes_configs(run: Path, whole_run: bool) -> None:
    arguments = {"config_path": str(run), "whole_run": whole_run}
    found = run_ranks("test_preflight_nodes:compare_with_own_seed", 2, arguments)
    assert found[0] == found[1]
    said, bandwidth = found[0]
    assert said.startswith("the nodes differ in their config: seed is 0 on node 0")
    if not whole_run:
        assert bandwidth is not None
        assert (bandwidth.kind, bandwidth.num_ranks) == ("gloo", 2)
        assert bandwidth.gb_s > 0
        assert judge(bandwidth, bandwidth.gb_s * 2).status == "fail"
