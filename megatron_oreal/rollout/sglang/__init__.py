"""SGLang rollout engines: servers beside the ranks, the dispatcher over them, and their weights.

Modules that run in the trainer import no SGLang: only ``launch``, ``worker`` and ``sampler`` do, inside the server.
"""
