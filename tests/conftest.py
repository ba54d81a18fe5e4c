"""Hypothesis: the same examples in every run, and no time limits; ``--hypothesis-profile random`` draws others."""

from hypothesis import HealthCheck, settings

# A busy machine is no failure, and a new counterexample belongs to who looks for one, not to whose change CI checks.
untimed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **untimed)
settings.register_profile("random", derandomize=False, **untimed)
settings.load_profile("same")
