"""Verdicts on responses: the rules and the pool of processes that applies them. Importing it imports no torch."""

from megatron_oreal.verifier.pool import VerifierPool, VerifyItem
from megatron_oreal.verifier.verdict import Judgement, Verdict

__all__ = ["Judgement", "Verdict", "VerifierPool", "VerifyItem"]
