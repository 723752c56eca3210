"""What holds for all tests."""

from hypothesis import settings

# Tests run beside each other on shared cores: how long an example takes says nothing of the code.
settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")
