"""Verdicts on responses: rules in worker processes, then a judge behind an API. Importing it imports no torch."""

from megatron_oreal.verifier.pool import VerifierPool, VerifyItem
from megatron_oreal.verifier.verdict import Judgement, Verdict
from megatron_oreal.verifier.verifier import Verifier

__all__ = ["Judgement", "Verdict", "Verifier", "VerifierPool", "VerifyItem"]
