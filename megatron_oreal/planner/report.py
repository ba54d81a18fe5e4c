"""A plan as text of at most 120 columns."""

from __future__ import annotations

import textwrap

from megatron_oreal.layout.statistics import format_bytes
from megatron_oreal.planner.plan import Report
from megatron_oreal.planner.report_json import recompute_text, shown
from megatron_oreal.planner.search import Found
from megatron_oreal.planner.types import GIB, RankMemory
from megatron_oreal.planner.variants import as_overrides

WIDTH = 120
_PHASES_A_TABLE = 7
_LEAST_SHOWN = 0.005 * GIB


def as_text(report: Report) -> str:
    """The report."""
    sections = [
        _header(report),
        _memory(report),
        _placement(report),
        _traffic(report),
        _step(report),
        *([_search(report)] if report.search is not None else []),
        _assumptions(report),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


# Header


def _header(report: Report) -> list[str]:
    setting, device, args = report.setting, report.device, report.arguments
    config, spec = setting.config, setting.spec
    parallel, rollout, grid = config.parallel, config.rollout, report.placement.grid
    overrides = f" {' '.join(args.overrides)}" if args.overrides else ""
    tied = ", tied embeddings" if spec.tied_embeddings else ""
    vpp = parallel.virtual_pipeline_model_parallel_size
    sizes = f"TP {grid.tp} x PP {grid.pp}" + (f" (VPP {vpp})" if vpp else "") + f" x DP {grid.dp}"
    traits = [sizes] + (["sequence parallel"] if parallel.sequence_parallel else [])
    traits += [f"recompute {recompute_text(setting)}", f"{parallel.max_tokens_per_microbatch:,} tokens a micro-batch"]
    traits += [f"offload {', '.join(parallel.offload) or 'nothing'}", setting.implementation]
    engines = report.placement.engines
    cache = report.model.cache_tokens(setting, report.placement, report.worst)
    each = f"{len(engines[0])} rank{'s' if len(engines[0]) > 1 else ''}"
    kind = "SGLang servers" if report.placement.is_served else "embedded engines"
    rows = [
        ("plan of", f"{args.config}{overrides}"),
        (
            "model",
            f"{spec.family}, {spec.num_layers} layers, hidden {spec.hidden_size}, {spec.num_heads} heads "
            f"({spec.num_kv_heads} KV), vocabulary {spec.vocab_size}{tied}: {spec.num_parameters() / 1e9:.2f} B "
            f"parameters, {config.model.dtype}; shape from {shown(report.shape_dir / 'config.json')}",
        ),
        (
            "ranks",
            f"{setting.world_size} on {report.placement.num_nodes} node{'s' if report.placement.num_nodes > 1 else ''} "
            f"of {setting.ranks_per_node}",
        ),
        (
            "GPU",
            f"{device.name}: {device.memory_bytes / GIB:.1f} GiB, {device.flops / 1e12:g} TFLOP/s bf16, HBM "
            f"{device.hbm / 1e12:.2f} TB/s, node {device.nvlink / 1e9:g} GB/s, network {device.network / 1e9:g} GB/s "
            f"({device.source})",
        ),
        ("trainer", ", ".join(traits)),
        (
            "engines",
            f"{len(engines)} {kind} of {each}, KV cache of {cache:,} tokens and at most "
            f"{rollout.max_running_requests} requests each; {rollout.prompts_per_step} x {rollout.prompt_repeat_k} "
            f"responses a step of at most {rollout.gen_max_new:,} new tokens, {rollout.gen_max_length:,} in all",
        ),
    ]
    lines = [line for key, value in rows for line in _row(key, value)]
    return lines + [line for warning in report.warnings for line in _row("warning", warning)]


# Memory


def _memory(report: Report) -> list[str]:
    worst, limit = report.worst, report.setting.device_memory_bytes
    peak = worst.peak
    free = limit - peak.total
    verdict = f"fits: {free / GIB:.1f} GiB left" if free >= 0 else f"DOES NOT FIT: {-free / GIB:.1f} GiB too much"
    lines = [
        f"MEMORY in GiB: {verdict} at the peak of {peak.total / GIB:.1f} of {limit / GIB:.1f}, on rank {worst.rank} "
        f"(TP {worst.tp_rank}, PP {worst.pp_rank}, DP {worst.dp_rank}) in {peak.name}"
    ]
    if not report.cache_is_large_enough:
        longest = report.setting.config.rollout.gen_max_length
        lines.append(f"DOES NOT FIT: the KV cache holds less than one response of {longest:,} tokens")
    lines += _memory_tables(worst)
    others = ", ".join(
        f"rank {rank.rank} (stage {rank.pp_rank}) {rank.peak.total / GIB:.1f} in {rank.peak.name}"
        for rank in report.memory
    )
    if len(report.memory) > 1:
        lines += _row("stages", f"ranks of a stage differ in nothing; one of each: {others}")
    if worst.modelled:
        lines += _row("formulas", "not from tensors that were made but from a formula: " + ", ".join(worst.modelled))
    if worst.host:
        items = ", ".join(f"{name} {size / GIB:.1f}" for name, size in worst.host.items() if size)
        total = sum(worst.host.values()) * min(report.setting.ranks_per_node, report.setting.world_size)
        if items:
            lines += _row("host", f"{items}; a node {total / GIB:.0f}")
    if report.rank_memory is not None:
        lines += ["", f"rank {report.rank_memory.rank}:", *_memory_tables(report.rank_memory)]
    if not report.fits:
        lines += _nearest(report)
    return lines


def _memory_tables(rank: RankMemory) -> list[str]:
    items = list(dict.fromkeys([*rank.static, *(item for phase in rank.phases for item in phase.live)]))
    lines: list[str] = []
    for start in range(0, len(rank.phases), _PHASES_A_TABLE):
        phases = rank.phases[start : start + _PHASES_A_TABLE]
        heads = [phase.name.split("/") for phase in phases]
        for level in range(max(map(len, heads))):
            cells = [head[level] if level < len(head) else "" for head in heads]
            lines.append((" " * 25 + "".join(f"{cell[:12]:>13}" for cell in cells)).rstrip())
        for item in items:
            sizes = [phase.live.get(item, 0) for phase in phases]
            if max(sizes) >= _LEAST_SHOWN:
                lines.append(
                    f"  {item:<23}" + "".join(f"{size / GIB:>13.2f}" if size else f"{'-':>13}" for size in sizes)
                )
        marks = ["*" if phase is rank.peak else " " for phase in phases]
        totals = "".join(f"{mark + format(p.total / GIB, '.2f'):>13}" for p, mark in zip(phases, marks, strict=True))
        lines.append(f"  {'in all (* the peak)':<23}" + totals)
    return lines


def _nearest(report: Report) -> list[str]:
    if report.nearest is None:
        return _row("nearest", "nothing that fits was found within three changes; see --search, or plan more GPUs")
    found = report.nearest
    peak = found.memory.peak
    return _row(
        "nearest",
        f"fits with {' '.join(as_overrides(found.changes))} (peak {peak.total / GIB:.1f} GiB in {peak.name}, "
        f"{found.cost.tokens_per_s_per_gpu:.0f} tokens/s a GPU)",
    )


# Placement and traffic


def _placement(report: Report) -> list[str]:
    placement, check = report.placement, report.check
    grid = placement.grid
    edges, crossing = placement.pipeline_edges
    sound = "as it should be" if not check.problems else f"{len(check.problems)} PROBLEMS"
    lines = [f"PLACEMENT: rank = tp + {grid.tp} * (dp + {grid.dp} * pp), node = rank // {placement.ranks_per_node}"]
    tp_where = "across nodes" if placement.tp_crosses_nodes else "inside a node"
    dp_where = f"{placement.dp_members_a_node} of {grid.dp} ranks of a group on one node"
    rows = [
        ("TP", f"{len(placement.tp_groups)} groups of {grid.tp} neighbours, {tp_where}"),
        ("DP", f"{grid.tp * grid.pp} groups of {grid.dp}: {dp_where}"),
    ]
    if grid.pp > 1:
        rows.append(("PP", f"{edges} edges between stages, {crossing} of them between nodes"))
    first = placement.engines[0]
    rows.append(("engines", f"engine e on ranks {len(first)} * e to {len(first)} * e + {len(first) - 1}, on one node"))
    rows.append(
        (
            "checked",
            f"{check.elements:,} elements of {check.tensors} tensors on {check.ranks} ranks in {check.trainer_copies} "
            f"copies, {check.engines} complete engines, {check.requests:,} requests sent once each: {sound}",
        )
    )
    rows += [("problem", problem) for problem in check.problems[:10]]
    if report.arguments.rank is not None:
        rank = placement.describe_rank(report.arguments.rank)
        rows.append(
            (
                f"rank {rank['rank']}",
                f"node {rank['node']}, local rank {rank['local_rank']}, TP {rank['tp_rank']} of "
                f"{_ranks(rank['tp_group'])}, PP {rank['pp_rank']} of {_ranks(rank['pp_group'])}, DP "
                f"{rank['dp_rank']} of "
                f"{_ranks(rank['dp_group'])}, engine {rank['engine']} of {_ranks(rank['engine_ranks'])}",
            )
        )
    return lines + [line for key, value in rows for line in _row(key, value)]


def _ranks(ranks: list[int]) -> str:
    """``0-7``, ``0-120 by 8`` or ``5``."""
    if len(ranks) == 1:
        return str(ranks[0])
    step = ranks[1] - ranks[0]
    return f"{ranks[0]}-{ranks[-1]}" + (f" by {step}" if step != 1 else "")


def _traffic(report: Report) -> list[str]:
    traffic = report.traffic
    if traffic.nothing_moves:
        text = (
            f"nothing moves: every engine parameter is the trainer's own bytes ({format_bytes(traffic.engine)} a rank)"
        )
        return [f"RESHARD: {text}"]
    if not traffic.received_total:
        return [
            f"RESHARD: nothing passes between GPUs: of {format_bytes(traffic.engine)} an engine rank has "
            f"{format_bytes(traffic.in_place_max)} in place, and copies the rest on its GPU"
        ]
    lines = [
        f"RESHARD: an engine rank holds {format_bytes(traffic.engine)}, receives at most "
        f"{format_bytes(traffic.received_max)} (sends {format_bytes(traffic.sent_max)}), has "
        f"{format_bytes(traffic.in_place_max)} in place"
    ]
    where = (
        f"between nodes {format_bytes(traffic.cross_node)} in all" if traffic.cross_node else "nothing between nodes"
    )
    lines += _row("wire", f"{format_bytes(traffic.received_total)} in all, {where}; {traffic.pairs:,} pairs of ranks")
    busiest = f"{format_bytes(traffic.busiest_local)} in a node, {format_bytes(traffic.busiest_network)} of an adapter"
    lines += _row("busiest", f"{busiest}: {traffic.seconds:.2f} s, {traffic.busiest}")
    return lines


# Step


def _step(report: Report) -> list[str]:
    cost, rollout, update = report.cost, report.cost.rollout, report.cost.update
    lines = [
        f"STEP: {cost.seconds:.1f} s, {cost.tokens_per_s_per_gpu:.0f} tokens/s a GPU ({cost.tokens:,} prompt and "
        f"response tokens / step / {cost.world_size} GPUs), predicted"
    ]
    lines += [f"  {name:<24}{seconds:>9.2f} s {seconds / cost.seconds:>6.1%}" for name, seconds in cost.phases.items()]
    mean = rollout.lengths.mean()
    quantiles = ", ".join(f"{share:.0%} at {rollout.finished_by(share):.0f} s" for share in (0.5, 0.9, 0.99))
    lines += _row(
        "rollout",
        f"lengths {report.lengths} (mean {mean:.0f}, longest {rollout.lengths.max():,}); responses ended: {quantiles}, "
        f"the last at {rollout.seconds:.0f} s; at most {rollout.most_running} running an engine, decode step "
        f"{rollout.first_step_s * 1e3:.1f} ms then, {rollout.last_step_s * 1e3:.1f} ms for the last; engines idle "
        f"{rollout.idle_share:.0%} of the time, waiting for the last; prefill {rollout.prefill_s:.1f} s"
        + (f"; {rollout.retracted} requests put back for want of cache" if rollout.retracted else ""),
    )
    lines += _row(
        "update",
        f"{update.kept_sequences} sequences kept, {update.kept_tokens:,} tokens, {update.num_microbatches} "
        f"micro-batches a rank; busiest rank {update.balance:.3f} of the mean, padding {update.padding:.1%}; MFU "
        f"{update.mfu:.0%}",
    )
    for name, each in update.passes.items():
        parts = {
            "kernels": each.compute_s,
            "TP": each.tp_s,
            "host": each.host_s,
            "bubble": each.bubble_s,
            "DP": each.dp_s,
            "optimizer": each.optimizer_s,
        }
        shown = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items() if seconds >= 0.005)
        lines += _row("", f"{name}: {each.seconds:.2f} s = {shown}")
    return lines


# Search and assumptions


def _search(report: Report) -> list[str]:
    assert report.search is not None
    result = report.search
    lines = [
        f"SEARCH: {result.considered:,} settings, {result.fitting:,} fit; of each TP, PP, VPP and engine TP the "
        "fastest, confirmed by the real modules",
        f"  {'tokens/s/GPU':>12} {'step s':>7} {'roll':>6} {'update':>6} {'TP':>3} {'PP':>3} {'VPP':>4} {'DP':>4} "
        f"{'engine':>6} {'recompute':>10} {'tokens':>7} {'share':>6} {'peak':>6}  offload",
    ]
    lines += [_search_row(found, report) for found in result.best]
    if result.best:
        lines += _row("the first", " ".join(as_overrides(result.best[0].changes)) or "the config itself")
    fell = [f"{reason} {count:,}" for reason, count in result.reasons.most_common()]
    return lines + _row("fell out", "; ".join(fell))


def _search_row(found: Found, report: Report) -> str:
    config, cost = found.setting.config, found.cost
    parallel, rollout = config.parallel, config.rollout
    dp = found.setting.dp
    share = rollout.sglang.get("mem_fraction_static")
    update_s = sum(seconds for name, seconds in cost.phases.items() if name.startswith("update/"))
    offload = "+".join(parallel.offload) or "-"
    recompute: str = parallel.recompute_granularity or "-"
    if recompute == "selective":
        recompute = "+".join(parallel.recompute_modules or ["core_attn"])
    return (
        f"  {cost.tokens_per_s_per_gpu:>12.0f} {cost.seconds:>7.1f} {cost.phases['generate']:>6.1f} {update_s:>6.1f} "
        f"{parallel.tensor_model_parallel_size:>3} {parallel.pipeline_model_parallel_size:>3} "
        f"{parallel.virtual_pipeline_model_parallel_size or '-':>4} {dp:>4} {rollout.engine_tp:>6} "
        f"{recompute:>10} {parallel.max_tokens_per_microbatch:>7} {share or '-':>6} "
        f"{found.memory.peak.total / GIB:>6.1f}  {offload}"
    )


def _assumptions(report: Report) -> list[str]:
    lines = ["ASSUMPTIONS (--assume NAME=VALUE changes one; docs/planner.md explains them)"]
    for row in report.assumed.rows():
        value = f"{row['value']:g} {row['unit']}"
        lines.append(f"  {row['name']:<25}{value:<16} {row['source']}"[:WIDTH])
    return lines


def _row(key: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {key:<9} ", subsequent_indent=" " * 12, break_on_hyphens=False)
