"""What people call: the ``steerscope`` command."""
