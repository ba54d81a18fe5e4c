"""Prompts in, packed micro-batches out.

``prompts`` reads prompt sets, ``sampler`` orders them, ``chat`` turns them into tokens, ``trajectories`` records what
was sampled, ``packing`` makes micro-batches of it; ``types`` holds what they hand on. Import from the modules: those
that need no torch or transformers stay free of them.
"""
