"""The ``moelora`` command: one file per verb, put together in :mod:`moelora.cli.app`."""
