"""``megatron-oreal``: train | sft | eval | plan | bench | check | verify | env | report.

``megatron-oreal train CONFIG --nproc-per-node 8`` starts the ranks itself; ``torchrun ... -m megatron_oreal train
CONFIG`` works as well.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence

from megatron_oreal import __version__
from megatron_oreal.bench.compare import compare as compare_results
from megatron_oreal.bench.options import DEFAULT_TOLERANCE
from megatron_oreal.bench.options import add_arguments as add_bench_arguments
from megatron_oreal.bench.options import read_options as read_bench_options
from megatron_oreal.config import Config
from megatron_oreal.config_load import dump_config, load_config
from megatron_oreal.errors import UserError, of_key
from megatron_oreal.launch import Nodes, launch
from megatron_oreal.plan_options import add_arguments as add_plan_arguments
from megatron_oreal.preflight.meeting import JOIN_TIMEOUT_S
from megatron_oreal.preflight.options import add_arguments as add_check_arguments
from megatron_oreal.verify import add_arguments as add_verify_arguments
from megatron_oreal.verify import verify

# Between a rank's last line and the end of its process lie seconds on a busy machine.
_FIRST_RANK_SPEAKS_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 after one line on standard error for a user's mistake.

    1 when engines or the training cannot go on.
    """
    arguments = _parse(argv)
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale that lacks a character must not end a run
    if argv is None and (arguments.command in ("plan", "env", "report") or getattr(arguments, "print_config", False)):
        # "| head" ends what only prints, as it ends other programs; Python by itself shows a traceback.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        return arguments.run(arguments)
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130


def _refuse(error: Exception, status: int = 2) -> int:
    """Say the mistake once a node. Nearly always all ranks see it, and the launcher ends them when one has exited.

    So the others let the first rank of their node speak and exit; what that one has not seen is said after a while.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first:
        print(f"error: {error}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        from megatron_oreal.platform import refuse_to_join  # it brings torch with it

        refuse_to_join(str(error))  # other nodes may wait for this rank
    if not is_first:
        time.sleep(_FIRST_RANK_SPEAKS_S)
        print(f"error: rank {os.environ.get('RANK')}: {error}", file=sys.stderr, flush=True)
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options; argparse by itself leaves those behind an option over."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-oreal", description="OREAL on Megatron-core and rollout engines")
    parser.add_argument("--version", action="version", version=f"megatron-oreal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help_, description=help_)

    for name, help_ in (
        ("train", "train with OREAL; resumes from the newest checkpoint in work_dir"),
        ("sft", "supervised phase on worked solutions"),
        ("eval", "pass@1 of model.path on evaluation.data"),
    ):
        command = add(name, help_)
        command.add_argument("config", help="YAML file")
        _add_config_arguments(command)
        command.set_defaults(run=_with_config)
    bench = add("bench", "throughput of a step's parts on this machine, or --compare two results")
    bench.add_argument("config", nargs="?", help="YAML file")
    _add_config_arguments(bench)
    add_bench_arguments(bench)
    bench.set_defaults(run=_bench)
    preflight = add("check", "whether everything is there that a run needs, on every node")
    preflight.add_argument("config", help="YAML file")
    _add_config_arguments(preflight)
    add_check_arguments(preflight)
    preflight.set_defaults(run=_check)
    check = add("verify", "verdict on one answer, or on a file of them")
    add_verify_arguments(check)
    check.set_defaults(run=verify)
    planning = add("plan", "memory, placement, traffic and step time of a run, without a GPU")
    add_plan_arguments(planning)
    planning.set_defaults(run=_plan)
    environment = add("env", "which accelerated parts this machine uses, and what replaces others")
    environment.add_argument("--json", action="store_true", help="as one JSON object")
    environment.set_defaults(run=_env)
    report = add("report", "summary and report.png of a work_dir")
    report.add_argument("work_dir", help="of a run, also while it goes on")
    report.set_defaults(run=_report)
    return parser


def _add_config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example rollout.top_p=0.95")
    ranks = command.add_argument_group("ranks to start (leave out under torchrun, or for a single process)")
    ranks.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks on this node, one a GPU")
    ranks.add_argument("--nnodes", type=int, default=1, metavar="N", help="nodes [1]")
    ranks.add_argument("--node-rank", type=int, default=0, metavar="R", help="this node, from 0 [0]")
    ranks.add_argument("--master-addr", default="localhost", metavar="HOST", help="of node 0 [localhost]")
    ranks.add_argument("--master-port", type=int, default=29500, metavar="PORT", help="free on node 0 [29500]")
    ranks.add_argument(
        "--join-timeout",
        type=float,
        default=JOIN_TIMEOUT_S,
        metavar="S",
        help=f"nodes wait so long [{JOIN_TIMEOUT_S:g}]",
    )
    command.add_argument("--print-config", action="store_true", help="print the effective config and stop")


def _check(arguments: argparse.Namespace) -> int:
    if arguments.print_config:
        return _with_config(arguments)
    if arguments.nproc_per_node is None:
        arguments.nproc_per_node = 1
    from megatron_oreal.preflight.check import check

    return check(arguments, _nodes(arguments))


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.compare is not None:
        if arguments.config is not None:
            raise UserError(f"--compare takes two results and no config ({arguments.config!r}): leave one of them out")
        tolerance = DEFAULT_TOLERANCE if arguments.tolerance is None else arguments.tolerance
        before, after = arguments.compare
        return compare_results(before, after, tolerance)
    if arguments.config is None:
        raise UserError("bench needs a config file, or --compare A.json B.json")
    arguments.bench = read_bench_options(arguments)
    return _with_config(arguments)


def _with_config(arguments: argparse.Namespace) -> int:
    for option, value, alone in (("--nnodes", arguments.nnodes, 1), ("--node-rank", arguments.node_rank, 0)):
        if value != alone and arguments.nproc_per_node is None:
            raise UserError(f"{option}={value} needs --nproc-per-node, the ranks to start on every node")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    if arguments.nproc_per_node is not None and "LOCAL_RANK" not in os.environ:
        return _launch(arguments, config)
    _quieten()
    # Imported here: Megatron takes seconds, and a mistake in the config should not.
    from megatron_oreal.actor.optimizer import NonFiniteGradientError
    from megatron_oreal.rollout.engine import EngineError

    try:
        if arguments.command == "train":
            from megatron_oreal.train import train

            train(config)
        elif arguments.command == "sft":
            from megatron_oreal.sft import supervise

            supervise(config)
        elif arguments.command == "bench":
            from megatron_oreal.bench.run import bench

            bench(config, arguments.bench)
        else:
            from megatron_oreal.evaluate import evaluate_model

            evaluate_model(config)
    except (EngineError, NonFiniteGradientError) as error:  # their words say what has happened, and what to do
        return _refuse(error, status=1)
    return 0


def _nodes(arguments: argparse.Namespace) -> Nodes:
    nodes = Nodes(
        arguments.nproc_per_node,
        arguments.nnodes,
        arguments.node_rank,
        arguments.master_addr,
        arguments.master_port,
        arguments.join_timeout,
    )
    for option, value in (("--nproc-per-node", nodes.nproc_per_node), ("--nnodes", nodes.nnodes)):
        if value < 1:
            raise UserError(f"{option}={value}: must be 1 or more")
    if not 0 <= nodes.node_rank < nodes.nnodes:
        raise UserError(
            f"--node-rank={nodes.node_rank} is not one of the --nnodes={nodes.nnodes} nodes, which count from 0"
        )
    if not 0 < nodes.master_port < 2**16:
        raise UserError(f"--master-port={nodes.master_port}: must be from 1 to 65535")
    if not 0 < nodes.join_timeout_s <= 86400:
        raise UserError(f"--join-timeout={nodes.join_timeout_s:g}: must be above 0 and at most 86400 seconds")
    return nodes


def _launch(arguments: argparse.Namespace, config: Config) -> int:
    """Find mistakes here, in a second, before any rank is started."""
    nodes = _nodes(arguments)
    # Imported here, as below: they bring torch with them.
    from megatron_oreal.config_check import check_config
    from megatron_oreal.layout.model_spec import load_model_spec
    from megatron_oreal.preflight.devices import require_gpus

    def look() -> None:
        require_gpus(config.device, nodes.nproc_per_node)
        with of_key("model.path"):
            spec = load_model_spec(config.model.path)
        check_config(config, spec, nodes.world_size, nodes.nproc_per_node)

    overrides = [*arguments.overrides]
    if nodes.nnodes == 1:
        look()
    else:
        from megatron_oreal.preflight.join import join

        overrides += join(nodes, config, look)
    options = arguments.bench.arguments() if arguments.command == "bench" else []
    return launch([arguments.command, arguments.config, *overrides, *options], nodes)


def _plan(arguments: argparse.Namespace) -> int:
    _quieten()
    from megatron_oreal.planner.plan import plan

    return plan(arguments)


def _env(arguments: argparse.Namespace) -> int:
    from megatron_oreal.accelerators import survey

    found = survey()
    print(found.as_json() if arguments.json else found.as_text())
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megatron_oreal.telemetry import summary, write_report

    print(summary(arguments.work_dir))
    print(f"curves: {write_report(arguments.work_dir)}")
    return 0


def _quieten() -> None:
    """Hide what libraries say about their own deprecations and absent optional parts; our own messages are prints."""
    warnings.filterwarnings("ignore", module="megatron|torch|transformer_engine|apex")


if __name__ == "__main__":
    sys.exit(main())
