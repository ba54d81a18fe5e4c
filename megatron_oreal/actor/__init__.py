"""Megatron-core models on this rank: policy, reference and token reward model, their schedules and optimizers.

Import from the modules: ``actor.actor`` holds the class that the training loop moves.
"""
