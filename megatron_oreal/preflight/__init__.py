"""What has to be right before a run starts, found before any model is built: ``megatron-oreal check``.

``Meeting`` and ``identity`` serve ``train`` too: nodes that do not meet or do not agree end there in one line.
"""
