"""``megatron-oreal bench``: throughput of a step's parts, and of whole steps, on the machine at hand.

``options`` is the command line, ``workload`` what is drawn, ``parts`` what is measured, ``figures`` what comes of it,
``compare`` two results side by side, ``run`` the command. Definitions of all figures: ``docs/bench.md``.
"""
