"""The losses: the float64 oracle, token weights, the vocab-parallel policy loss, the reward model's loss."""

from megatron_oreal.loss.chunked import auto_chunk_tokens, linear_policy_loss, linear_token_logprobs
from megatron_oreal.loss.coefficients import TokenCoefficients
from megatron_oreal.loss.folding import make_coefficients
from megatron_oreal.loss.fused import Vocabulary
from megatron_oreal.loss.policy_loss import PolicyLoss, policy_loss, token_logprobs
from megatron_oreal.loss.reference import OrealLoss, oreal_loss_reference
from megatron_oreal.loss.reward_model_loss import RewardModelLoss, reward_model_loss
from megatron_oreal.loss.settings import LossSettings
from megatron_oreal.loss.token_weights import token_weights

__all__ = [
    "LossSettings",
    "OrealLoss",
    "PolicyLoss",
    "RewardModelLoss",
    "TokenCoefficients",
    "Vocabulary",
    "auto_chunk_tokens",
    "linear_policy_loss",
    "linear_token_logprobs",
    "make_coefficients",
    "oreal_loss_reference",
    "policy_loss",
    "reward_model_loss",
    "token_logprobs",
    "token_weights",
]
