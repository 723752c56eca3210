"""What holds for all tests."""

from hypothesis import settings

# Tests run beside each other on shared cores: how long an example takes says nothing of the code.
settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")
# More of the same: pytest --hypothesis-profile deep tests/fuzz
settings.register_profile("deep", deadline=None, max_examples=1000)
