"""What a run says about itself: metrics, timers, progress, the step table, the report."""

from megatron_oreal.telemetry.logger import MetricLogger
from megatron_oreal.telemetry.progress import Bar, progress
from megatron_oreal.telemetry.report import summary, write_report
from megatron_oreal.telemetry.statistics import Interval, grouped_interval, pass_at_1, wilson_interval
from megatron_oreal.telemetry.table import StepTable
from megatron_oreal.telemetry.timers import PhaseTimers

__all__ = [
    "Bar",
    "Interval",
    "MetricLogger",
    "PhaseTimers",
    "StepTable",
    "grouped_interval",
    "pass_at_1",
    "progress",
    "summary",
    "wilson_interval",
    "write_report",
]
